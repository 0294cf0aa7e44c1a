"""What happened, for people: tables and plots."""

from taskzip.report.summary import summary_table

__all__ = ["summary_table"]

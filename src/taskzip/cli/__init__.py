"""The command line."""

from taskzip.cli.app import app, main

__all__ = ["app", "main"]

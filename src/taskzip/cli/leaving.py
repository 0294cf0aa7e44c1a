"""How a command ends: the exit code, and one sentence on standard error instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from taskzip.errors import TaskzipError

FAILED = 1
INTERRUPTED = 130


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors that people can do something about, and Ctrl-C, into one line and an exit code.

    Any other exception is a bug of taskzip and keeps its traceback.
    """
    try:
        yield
    except TaskzipError as error:
        complain(str(error))
        raise typer.Exit(FAILED) from error
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        complain(f"{where}{error.strerror or error}")
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        complain("interrupted")
        raise typer.Exit(INTERRUPTED) from None


def complain(sentence: str) -> None:
    """Print one line on standard error."""
    typer.echo(f"taskzip: {sentence}", err=True)

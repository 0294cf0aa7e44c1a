"""`taskzip`: the commands, one file each, under one name."""

from typing import Annotated

import typer

import taskzip
from taskzip.cli.demo import demo
from taskzip.cli.leaving import INTERRUPTED, complain
from taskzip.cli.reproduce import app as reproduce

app = typer.Typer(
    name="taskzip",
    help="Merge trained PyTorch networks, after training, into one network that does every task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.add_typer(reproduce, name="reproduce")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"taskzip {taskzip.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Options that stand before the command."""
    context.obj = quiet


def main() -> None:
    """Run the command line; the process ends with 0, 1 (an error in one sentence), 2 (usage) or 130 (Ctrl-C)."""
    try:
        app()
    except KeyboardInterrupt:
        complain("interrupted")
        raise SystemExit(INTERRUPTED) from None

"""`taskzip reproduce`: the paper's experiments on MNIST, from training to the picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from taskzip.cli.leaving import exit_codes
from taskzip.experiments import Shelf, fig2, methods, table1

app = typer.Typer(
    help="The paper's experiments on MNIST (Sec. 4.1), and what each step is worth, from training to the picture.",
    no_args_is_help=True,
)

Out = Annotated[Path, typer.Option(help="Folder for results and trained networks; what is there is not done again.")]
HERE = Path("runs/reproduce")


@app.command("fig2")
def fig2_command(
    context: typer.Context,
    out: Out = HERE,
    every: Annotated[
        int, typer.Option(min=1, max=300, help="Units of the first layer from point to point; 1 for all.")
    ] = 4,
) -> None:
    """Test error against the number of shared units, LeNet-300-100: fig2.csv and fig2.png."""
    with exit_codes():
        _show(context, fig2.run(_shelf(context, out), out, every), out / "fig2.png")


@app.command("table1")
def table1_command(context: typer.Context, out: Out = HERE) -> None:
    """Dense and sparse LeNets, all hidden units shared, before and after retraining: table1.md."""
    with exit_codes():
        _show(context, table1.run(_shelf(context, out), out), out / "table1.md")


@app.command("methods")
def methods_command(
    context: typer.Context,
    case: Annotated[methods.Case, typer.Argument(help="Which networks.")],
    out: Out = HERE,
) -> None:
    """What each step of the method is worth, and what rivals do: methods-<case>.csv and .md."""
    with exit_codes():
        _show(context, methods.run(_shelf(context, out), out, case), out / f"methods-{case}.md")


def _shelf(context: typer.Context, out: Path) -> Shelf:
    console = Console(stderr=True, quiet=bool(context.obj), highlight=False, soft_wrap=True)
    start = time.perf_counter()
    return Shelf(out / "networks", lambda line: console.print(f"{time.perf_counter() - start:5.0f} s  {line}"))


def _show(context: typer.Context, table: str, path: Path) -> None:
    console = Console(quiet=bool(context.obj), highlight=False, soft_wrap=True)
    console.print(table, markup=False)
    console.print(f"\nWritten to {path}.")

"""The command line, `hugging-nano-gpt`: parse, call one library function, print.

It lies beside the package and imports it only when a command runs: importing the package imports torch and registers
the Auto classes, and --help should answer at once.
"""

import json
import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="nanoGPT checkpoints as native Transformers models, and back, with every number the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(version("hugging-nano-gpt"))
        raise typer.Exit


@app.callback()
def _set_up(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo() -> None:
    """Take the bundled nanoGPT checkpoint through the whole round trip and prove every step equal."""
    _quieten_transformers()
    from hugging_nano_gpt.demo import run_demo

    raise typer.Exit(0 if run_demo() else 1)


class _Activation(StrEnum):
    """NanoGPTConfig's activations; importing them from there would import torch."""

    GELU = "gelu"
    GELU_NEW = "gelu_new"
    GELU_PYTORCH_TANH = "gelu_pytorch_tanh"


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint file, saved folder or hub id.")],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="What to compare it with.")] = None,
    nanogpt: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare with a checkout of nanoGPT: this runs its model.py.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare its best_val_loss with the loss on DIR/val.bin.")
    ] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare gradients too.")] = False,
    activation: Annotated[
        _Activation | None, typer.Option(help="GELU of checkpoint files, in place of what their age tells.")
    ] = None,
    n_head: Annotated[int | None, typer.Option(min=1, help="Heads, for files that do not record them.")] = None,
    eval_iters: Annotated[int | None, typer.Option(min=1, help="Batches for --data, in place of A's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prove that two models are the same: tensors, logits, loss and greedy tokens. Exits with 1 if they are not."""
    if sum(other is not None for other in (b, nanogpt, data)) != 1:
        raise typer.BadParameter("expected exactly one of B, --nanogpt and --data")
    if data is None and eval_iters is not None:
        raise typer.BadParameter("expected --eval-iters only with --data")
    if data is not None and gradients:
        raise typer.BadParameter("expected no --gradients with --data, which compares the loss alone")
    _quieten_transformers()
    from transformers.utils import logging

    from hugging_nano_gpt.verify import verify_against_nanogpt, verify_loss, verify_models

    logging.set_verbosity_error()  # what Transformers would warn of, the report or the error says

    settings = {"activation_function": activation and activation.value, "n_head": n_head}
    if data is not None:
        report = verify_loss(a, data, eval_iters=eval_iters, progress=_print_progress, **settings)
    elif nanogpt is not None:
        report = verify_against_nanogpt(a, nanogpt, gradients=gradients, **settings)
    else:
        report = verify_models(a, b, gradients=gradients, **settings)
    print(json.dumps(report.to_json(), indent=2) if as_json else report)
    raise typer.Exit(0 if report.is_equal else 1)


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr)


def _quieten_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def main() -> None:
    """Runs the command line; errors of ours go to stderr in one line, without a traceback."""
    try:
        app()
    except Exception as error:
        package = sys.modules.get("hugging_nano_gpt")
        if package is None or not isinstance(error, package.NanoGPTError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

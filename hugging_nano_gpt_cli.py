"""The command line, `hugging-nano-gpt`: parse, call one library function, print.

It lies beside the package and imports it only when a command runs: importing the package imports torch and registers
the Auto classes, and --help should answer at once.
"""

import sys
from importlib.metadata import version
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

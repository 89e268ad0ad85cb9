"""The program: its own options, and how a command is registered and prints its result."""

import functools
import inspect
import json
import platform
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from .options import QUIET

app = typer.Typer(
    help="nanoGPT checkpoints as native Transformers models, and back, with every number the same.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

is_debugging = False


def _print_version(context: typer.Context, is_wanted: bool) -> None:
    if is_wanted:
        print("\n".join(_list_versions()) if context.params["verbose"] else version("hugging-nano-gpt"))
        raise typer.Exit


def _list_versions() -> list[str]:
    """Lists what a bug report has to name."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    packages = [f"{package} {version(package)}" for package in ("hugging-nano-gpt", "torch", "transformers")]
    system = [f"Python {platform.python_version()}", f"platform {platform.platform()}", f"device {device}{name}"]
    return packages + system


@app.callback()
def _set_up(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", is_eager=True, help="With --version: torch, Transformers, device and system too."),
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    if verbose:
        raise typer.BadParameter("expected --verbose only with --version")
    global is_debugging
    is_debugging = debug


def command(*options: inspect.Parameter, has_progress: bool = True, is_quiet: bool = False, **kwargs: Any) -> Any:
    """Registers a command: it gets the options that have a value as keywords, after Transformers is set up.

    Every command has --quiet; a function that shows progress or logs on its own has a parameter `quiet`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function).parameters
        own = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD and p.name != QUIET.name]
        signature = inspect.Signature([*own, *options, QUIET])

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = {name: value for name, value in bound.arguments.items() if value not in (None, [])}
            quiet = given["quiet"] if QUIET.name in parameters else given.pop("quiet")
            set_up_transformers(has_progress=has_progress and not quiet, is_quiet=is_quiet or quiet)
            if quiet:
                warnings.simplefilter("ignore")
            function(**{name: getattr(value, "value", value) for name, value in given.items()})

        run.__signature__ = signature  # typer and docs/make_cli.py read it
        return app.command(**kwargs)(run)

    return register


def set_up_transformers(has_progress: bool, is_quiet: bool) -> None:
    from transformers.utils import logging

    if is_quiet:
        logging.set_verbosity_error()
        logging.get_logger("hugging_nano_gpt").setLevel("ERROR")
    if not (has_progress and sys.stderr.isatty()):
        logging.disable_progress_bar()


def print_result(result: Any, as_json: bool) -> None:
    print(json.dumps(result.to_json(), indent=2, allow_nan=False) if as_json else result)

"""Writes docs/cli.md from the command line itself, so that the page cannot go stale: python docs/make_cli.py."""

import inspect
from enum import EnumType
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import typer

from hugging_nano_gpt_cli.program import app

PATH = Path(__file__).with_name("cli.md")

HEAD = """# The command line

`hugging-nano-gpt` comes with the package; every command is one call of the library. `python -m hugging_nano_gpt` is
the same program. `-h` lists commands and options, and `-V` is `--version`. Results go to standard output; notes,
progress, log lines and errors go to standard error, with `--quiet` only errors. The exit code is 0 when all went well,
1 for an error or a mismatch, 2 for wrong usage. Nothing is overwritten without `--force`, and a failure leaves nothing
half written. An error takes one line; `hugging-nano-gpt --debug COMMAND ...` shows its traceback, and
`hugging-nano-gpt --version --verbose` prints the versions and the device that a report of a fault needs.
`hugging-nano-gpt --install-completion` completes commands and options in your shell.

This page is made by `python docs/make_cli.py`.
"""


def make_page() -> str:
    """Returns the page: a section a command, a table of what it takes."""
    return "\n".join([HEAD, *(_describe(command.callback) for command in app.registered_commands)])


def _describe(function: Any) -> str:
    parameters = list(inspect.signature(function).parameters.values())
    arguments = [parameter for parameter in parameters if _is_argument(parameter)]
    options = [parameter for parameter in parameters if not _is_argument(parameter)]
    usage = ["hugging-nano-gpt", function.__name__, *map(_name, arguments), *(["[OPTIONS]"] if options else [])]
    rows = [f"| `{_name(p)}` | {_get_info(p).help}{_default(p)} |" for p in arguments + options]
    table = ["", "| | |", "|---|---|", *rows] if rows else []
    return "\n".join([f"## {function.__name__}", "", "```", " ".join(usage), "```", "", function.__doc__, *table, ""])


def _get_info(parameter: inspect.Parameter) -> Any:
    """Returns typer's description of a parameter."""
    return parameter.annotation.__metadata__[0]


def _is_argument(parameter: inspect.Parameter) -> bool:
    return isinstance(_get_info(parameter), typer.models.ArgumentInfo)


def _name(parameter: inspect.Parameter) -> str:
    info = _get_info(parameter)
    if _is_argument(parameter):
        name = (info.metavar or parameter.name.upper()).strip("[]")
        return name if parameter.default is inspect.Parameter.empty else f"[{name}]"
    names = [info.default, *(info.param_decls or ())]  # inside Annotated, typer takes the first name for a default
    flag = next((name for name in names if isinstance(name, str)), f"--{parameter.name.replace('_', '-')}")
    annotation = get_args(parameter.annotation)[0]  # of Annotated
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    if kinds == [bool]:
        return flag
    choices = r"\|".join(kinds[0]) if isinstance(kinds[0], EnumType) else None
    return f"{flag} {choices or info.metavar or kinds[0].__name__.upper()}"


def _default(parameter: inspect.Parameter) -> str:
    is_given = parameter.default not in (None, False, inspect.Parameter.empty)
    return f" Default: {parameter.default}." if is_given else ""


if __name__ == "__main__":
    PATH.write_text(make_page())

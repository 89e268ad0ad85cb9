"""The errors of this package, the check for packages that are not installed, and how lists are cut in messages.

Each message reads `<where>: <what is wrong>: expected X, got Y; <what to do>`. All errors can be caught together as
NanoGPTError, and each is also of the built-in type that a caller would expect.
"""

import re
import shlex
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from typing import Any

_MOST_LISTED = 5
_LONGEST_SHOWN = 100


class NanoGPTError(Exception):
    """Base class of every error of this package."""


class CheckpointError(NanoGPTError, ValueError):
    """A checkpoint file cannot be read or written: not the right kind, damaged, incomplete, or unsafe."""


class ConversionError(NanoGPTError, ValueError):
    """A model or a state cannot be expressed in another form without changing what it computes."""


class TokenizerError(NanoGPTError, ValueError):
    """A tokenizer file cannot be read, or a text or an id is outside its vocabulary."""


class DataError(NanoGPTError, ValueError):
    """A token file cannot be read, is not whole, or does not fit the model."""


class MissingDependencyError(NanoGPTError, ImportError):
    """A package that only some functions need is not installed; the message names the command that installs it."""


class VerifyError(NanoGPTError, RuntimeError):
    """A comparison cannot be made: nanoGPT's code is not found, or does not run."""


class DeviceError(NanoGPTError, RuntimeError):
    """torch cannot compute on the device that the user named."""


class ServerError(NanoGPTError, OSError):
    """A model or the playground's page cannot be served."""


def require(where: str, *requirements: str, alternative: str = "") -> None:
    """Raises MissingDependencyError unless all packages are installed.

    Args:
        where: What needs them.
        requirements: What pip takes: a package, or a package and its oldest version ("gradio>=6.24").
        alternative: What helps instead of installing them.
    """
    missing = [name for name in (re.split("[<>=]", text)[0] for text in requirements) if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{where}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install {shlex.join(requirements)}{alternative and f'; {alternative}'}"
        )


def list_some(names: Collection[Any]) -> str:
    """Lists the first five names, quoted, and the number of names if there are more."""
    return join_some([repr(name) for name in names])


def join_some(sentences: Sequence[str]) -> str:
    """Joins the first five sentences, and adds their number if there are more."""
    joined = ", ".join(sentences[:_MOST_LISTED])
    return joined if len(sentences) <= _MOST_LISTED else f"{joined}, ... ({len(sentences)} in all)"


def show(value: Any) -> str:
    """Returns a value as Python writes it, cut after 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than 4300 digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"

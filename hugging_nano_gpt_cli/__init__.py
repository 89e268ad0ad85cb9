"""The command line, `hugging-nano-gpt`: parse, call one library function, print.

It imports hugging_nano_gpt only when a command runs, because that imports torch, and --help should answer at once.
"""

import io
import sys

from . import commands, program

__all__ = ["commands", "main"]


def main() -> None:
    """Runs the command line; an error goes to stderr in one line, without a traceback unless --debug is given."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `<&-` in a shell
            setattr(sys, name, io.StringIO())
        elif sys.platform == "win32" and not stream.isatty():  # pipes and files would have the system's code page
            stream.reconfigure(encoding="utf-8")
    try:
        program.app()
    except Exception as error:
        if program.is_debugging:
            raise
        package = sys.modules.get("hugging_nano_gpt")
        is_ours = package is not None and isinstance(error, package.NanoGPTError)
        text = " ".join(str(error).split())
        print(
            f"error: {text}" if is_ours else f"error: {type(error).__name__}: {text}; --debug shows where",
            file=sys.stderr,
        )
        sys.exit(1)

"""The command line, `hugging-nano-gpt`: parse, call one library function, print.

It imports the package only when a command runs, because that imports torch, and --help should answer at once.
"""

import functools
import inspect as signatures
import io
import json
import platform
import re
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="nanoGPT checkpoints as native Transformers models, and back, with every number the same.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

_is_debugging = False


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
    global _is_debugging
    _is_debugging = debug


# Choices of the library; importing them from there would import torch.
_Activation = StrEnum("_Activation", {name: name for name in ("gelu", "gelu_new", "gelu_pytorch_tanh")})
_Dtype = StrEnum("_Dtype", {name: name for name in ("float32", "float16", "bfloat16")})
_Format = StrEnum("_Format", {name: name for name in ("gpt2", "gguf", "onnx")})
_FileType = StrEnum("_FileType", {name: name for name in ("f32", "f16", "q8_0")})


def _option(name: str, kind: Any, *flags: str, default: Any = None, **info: Any) -> signatures.Parameter:
    """Makes an option of a command, under the name of the library's argument; the flag is --name if none is given."""
    annotation = Annotated[kind, typer.Option(*flags, **info)]
    return signatures.Parameter(name, signatures.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _switch(name: str, flag: str, help_text: str) -> signatures.Parameter:
    return _option(name, bool, flag, default=False, help=help_text)


def _check_size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]B", text, re.IGNORECASE):
        raise typer.BadParameter(f"expected a number and a unit, as 5GB, got {text!r}")
    return text


_Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Checkpoint file, saved folder or hub id.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_FORCE = _switch("overwrite", "--force", "Overwrite existing files.")
_QUIET = _switch("quiet", "--quiet", "No notes, progress or log lines on standard error.")

# How to read a checkpoint file, how to load a model with its tokenizer, and where to compute with it.
_READING = (
    _option("activation_function", _Activation | None, "--activation", help="GELU of a file, instead of its era's."),
    _option("n_head", int | None, min=1, help="Heads, for files that do not record them."),
    _switch("ignore_extra", "--ignore-extra", "Ignore what a fork has added to its checkpoints."),
)
_LOADING = (
    _option("meta_path", Path | None, "--meta", metavar="FILE", help="The meta.pkl of the model's characters."),
    _option("tokenizer", str | None, metavar="NAME", help="A tiktoken encoding, or a tokenizer's folder or hub id."),
    _option("dtype", _Dtype | None, help="Dtype of the weights, instead of the file's."),
    *_READING,
)
_COMPUTING = (
    *_LOADING,
    _option("device", str | None, help="Device of torch, such as cuda:1 or mps; by default CUDA if there is a GPU."),
)
_SAMPLING = (
    _option("num_samples", int, min=1, default=10, help="Number of samples."),
    _option("max_new_tokens", int, min=1, default=500, help="Most tokens of each sample, past block_size too."),
    _option("temperature", float, min=0, default=0.8, help="Divides the logits; 0 is greedy."),
    _option("top_k", int, min=0, default=200, help="Number of likeliest tokens to sample from; 0 for all."),
    _option("seed", int, default=1337, help="Seed of the random numbers."),
    _option("stride", int, min=1, default=1, help="Tokens dropped at once past block_size; 1 as nanoGPT."),
    _switch("ignore_eos", "--ignore-eos", "Go on after the end token, as sample.py."),
)
_PREPARING = (
    _option(
        "tokenizer",
        str,
        metavar="NAME",
        default="gpt2",
        help="char; a tiktoken encoding; bpe:N, which trains one of N tokens; or a tokenizer's folder or hub id.",
    ),
    _option("column", str | None, metavar="NAME", help="Column with the texts of documents; by default text."),
    _option("num_proc", int | None, min=1, help="Threads that encode; the bytes are the same for any number."),
    _option("shard_size", int | None, min=1, help="Tokens of a shard, to write train_000000.bin and so on."),
    _FORCE,
)
_TRAINING = (
    _switch("resume", "--resume", "Continue from the last checkpoint in out_dir; start if there is none."),
    _switch("force", "--force", "Overwrite what an earlier run left in out_dir, and --folder."),
    _option("report_to", list[str] | None, metavar="NAME", help="Log to tensorboard, wandb or trackio; repeatable."),
    _option("folder", Path | None, metavar="DIR", help="Folder for Transformers to write with every ckpt.pt."),
    _option("loss_chunk_size", int | None, min=1, help="Tokens whose logits are in memory at once; by default all."),
    _switch("gradient_checkpointing", "--gradient-checkpointing", "Recompute activations instead of storing them."),
    _switch("bf16", "--bf16", "Compute in bfloat16, on a CPU too."),
    _switch("fsdp", "--fsdp", "Under torchrun: shard parameters and moments over the processes (FSDP2)."),
)
_SERVING = (
    _option("host", str, default="127.0.0.1", help="Address to listen on; 0.0.0.0 or :: for other machines."),
    _option("port", int, min=1, max=65535, default=8000, help="Port to listen on."),
    _option("queue", int, min=1, default=32, help="Requests that may wait; the others get the status 503."),
    _option("max_tokens", int, min=1, default=4096, help="Most tokens of all answers to a request, and of a prompt."),
    _option(
        "api_key",
        str | None,
        metavar="KEY",
        envvar="HUGGING_NANO_GPT_API_KEY",
        help="Key to require; or in HUGGING_NANO_GPT_API_KEY.",
    ),
    _option("allow_origin", str | None, metavar="ORIGIN", help="Web page that may ask, as http://localhost:3000."),
)


def _command(*options: signatures.Parameter, has_progress: bool = True, is_quiet: bool = False, **kwargs: Any) -> Any:
    """Registers a command: it gets the options that have a value as keywords, after Transformers is set up.

    Every command has --quiet; a function that shows progress or logs on its own has a parameter `quiet`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters = signatures.signature(function).parameters
        own = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD and p.name != _QUIET.name]
        signature = signatures.Signature([*own, *options, _QUIET])

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = {name: value for name, value in bound.arguments.items() if value not in (None, [])}
            quiet = given["quiet"] if _QUIET.name in parameters else given.pop("quiet")
            _set_up_transformers(has_progress=has_progress and not quiet, is_quiet=is_quiet or quiet)
            if quiet:
                warnings.simplefilter("ignore")
            function(**{name: getattr(value, "value", value) for name, value in given.items()})

        run.__signature__ = signature  # typer and docs/make_cli.py read it
        return app.command(**kwargs)(run)

    return register


def _set_up_transformers(has_progress: bool, is_quiet: bool) -> None:
    from transformers.utils import logging

    if is_quiet:
        logging.set_verbosity_error()
        logging.get_logger("hugging_nano_gpt").setLevel("ERROR")
    if not (has_progress and sys.stderr.isatty()):
        logging.disable_progress_bar()


def _print_result(result: Any, as_json: bool) -> None:
    print(json.dumps(result.to_json(), indent=2, allow_nan=False) if as_json else result)


@_command(*_PREPARING, has_progress=False, is_quiet=True)
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Text files, or a folder of .txt; .jsonl, .csv or .parquet files; or a data set of the Hub.",
        ),
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write, such as data/mine.")],
    **options: Any,
) -> None:
    """Make train.bin and val.bin of a text or documents, with the bytes of nanoGPT's prepare.py, and its tokenizer."""
    from hugging_nano_gpt import prepare_data

    prepare_data(sources, out_dir, **options, has_bar=sys.stderr.isatty())


@_command(
    *_LOADING,
    _option("max_shard_size", str, metavar="SIZE", callback=_check_size, default="50GB", help="Largest weights file."),
    _FORCE,
)
def convert(
    source: Annotated[
        str, typer.Argument(help="Checkpoint of nanoGPT, minGPT, build-nanogpt or llm.c; or a folder or hub id.")
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write.")],
    **options: Any,
) -> None:
    """Convert a checkpoint, or GPT-2, to a folder that Transformers loads anywhere and that can go to the Hub."""
    from hugging_nano_gpt import convert_to_folder

    print(convert_to_folder(source, out_dir, **options))


@_command(
    _option("best_val_loss", float | None, help="Instead of the recorded one: train.py saves only below it."),
    _option("optimizer_from", Path | None, metavar="CKPT", help="Checkpoint to take AdamW's moments from."),
    _FORCE,
)
def back(
    source: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="Saved folder or hub id; GPT-2's too.")],
    ckpt: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Checkpoint file to write, or a folder for its ckpt.pt.")
    ],
    **options: Any,
) -> None:
    """Convert a folder back to a checkpoint that nanoGPT's train.py resumes and its sample.py reads."""
    from hugging_nano_gpt import convert_to_checkpoint
    from hugging_nano_gpt.convert.folder import name_ckpt

    model = convert_to_checkpoint(source, ckpt, **options)
    iter_num, path = model.nanogpt_training_state.iter_num, options.get("optimizer_from")
    optimizer = "a fresh optimizer state" if path is None else f"the optimizer state of {path}"
    print(f"Wrote {name_ckpt(ckpt)}: {model.num_parameters():,} parameters, iteration {iter_num:,}, {optimizer}")


@_command(
    *_LOADING,
    _option("file_type", _FileType | None, help="Type of the weights in a gguf file; by default f32."),
    _FORCE,
)
def export(
    source: _Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder or file to write.")],
    to: Annotated[
        _Format,
        typer.Option(
            "--to",
            help="gpt2: a folder for GPT2LMHeadModel; gguf: a file for llama.cpp; onnx: a folder for ONNX Runtime.",
        ),
    ],
    **options: Any,
) -> None:
    """Export a model, with its tokenizer, to the layout of another program, which does not need this package."""
    from hugging_nano_gpt import export_model

    print(export_model(source, out, to=to, **options))


@_command(*_READING)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE_OR_DIR", help="Checkpoint file or saved folder.")],
    as_json: _Json = False,
    **options: Any,
) -> None:
    """Describe a checkpoint or a folder: its age, sizes, parameters, training state, and what was assumed."""
    from hugging_nano_gpt import inspect_path

    _print_result(inspect_path(path, **options), as_json)


# What Transformers would warn about is in the report or the error.
@_command(*_READING, is_quiet=True)
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint file, saved folder or hub id.")],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="What to compare it with.")] = None,
    nanogpt: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare with a checkout of nanoGPT: this runs its model.py.")
    ] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare gradients too.")] = False,
    as_json: _Json = False,
    **options: Any,
) -> None:
    """Prove that two models are the same: tensors, logits, loss and greedy tokens. Exits with 1 if they are not."""
    if (b is None) == (nanogpt is None):
        raise typer.BadParameter("expected exactly one of B and --nanogpt")
    from hugging_nano_gpt import verify_against_nanogpt, verify_models

    if nanogpt is not None:
        report = verify_against_nanogpt(a, nanogpt, gradients=gradients, **options)
    else:
        report = verify_models(a, b, gradients=gradients, **options)
    _print_result(report, as_json)
    raise typer.Exit(0 if report.is_equal else 1)


@_command(
    *_COMPUTING,
    _option("stride", int | None, min=1, help="Tokens from a window to the next; by default block_size."),
    _option("eval_iters", int | None, min=1, help="Batches of nanoGPT's estimate, instead of the run's own."),
    is_quiet=True,
)
def evaluate(
    source: _Source,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Token file (.bin, .npy), folder with val.bin or its shards, or any other file: text."
        ),
    ],
    expect_recorded: Annotated[
        bool, typer.Option("--expect-recorded", help="Exit with 1 unless the estimate agrees with the best_val_loss.")
    ] = False,
    as_json: _Json = False,
    **options: Any,
) -> None:
    """Compute the loss over every token of a file, its perplexity and bits per byte, and nanoGPT's own estimate."""
    if expect_recorded and not (data.is_dir() or data.name == "val.bin"):
        raise typer.BadParameter("expected --expect-recorded only with val.bin, whose loss train.py records")
    from hugging_nano_gpt import evaluate_loss

    evaluation = evaluate_loss(source, data, **options)
    _print_result(evaluation, as_json)
    raise typer.Exit(1 if expect_recorded and not evaluation.matches_recorded else 0)


@_command(*_SAMPLING, *_COMPUTING, is_quiet=True)
def generate(
    source: _Source,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue, or FILE:name; by default standard input, or else a newline."),
    ] = None,
    **options: Any,
) -> None:
    """Sample text as nanoGPT's sample.py does: the same defaults and text, up to the end token if there is one."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    from hugging_nano_gpt import sample_text

    sample_text(source, prompt or "\n", **options)


# train.py has a flag for each of its settings; the library knows them, so typer passes them on.
@_command(*_TRAINING, has_progress=False, is_quiet=True, context_settings={"ignore_unknown_options": True})
def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="SETTINGS", help="CONFIG.py and --key=value, as for train.py, in any number."),
    ] = None,
    *,
    quiet: bool,
    **options: Any,
) -> None:
    """Train as nanoGPT's train.py does, bit for bit: its settings, its log lines, its ckpt.pt; and resume exactly."""
    from hugging_nano_gpt.training import leave_processes, read_settings, run_training

    with leave_processes():
        run_training(read_settings(settings or []), **options, has_bar=sys.stderr.isatty() and not quiet)


@_command(_FORCE, has_progress=False)
def plot(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT_DIR...", help="For each run its out_dir, saved lines of train.py, or a trainer_state.json."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="Picture to write: .png, .svg or .pdf.")
    ] = Path("loss.png"),
    **options: Any,
) -> None:
    """Plot the train and val loss of one run or several, also while they train."""
    from hugging_nano_gpt.training import plot_losses

    plot_losses(sources, output, **options)
    print(f"Wrote {output}")


@_command(
    _option("port", int, min=1, max=65535, default=7860, help="Port of 127.0.0.1 to listen on."),
    *_COMPUTING,
    is_quiet=True,
)
def playground(
    source: Annotated[
        str | None, typer.Argument(help="Checkpoint file, saved folder or hub id; by default the bundled model.")
    ] = None,
    **options: Any,
) -> None:
    """Try a model in the browser: its text as it is generated, and the probabilities of each token. Until Ctrl-C."""
    from hugging_nano_gpt import run_playground

    run_playground(source, **options)


@_command(*_SERVING, *_COMPUTING, is_quiet=True)
def serve(source: _Source, *, quiet: bool, **options: Any) -> None:
    """Serve a model with OpenAI's API: completions and chats, streamed too. Until Ctrl-C."""
    from hugging_nano_gpt import run_server

    run_server(source, quiet=quiet, **options)


@_command(has_progress=False)
def demo() -> None:
    """Take the bundled nanoGPT checkpoint through the whole round trip and prove every step equal."""
    from hugging_nano_gpt.demo import run_demo

    raise typer.Exit(0 if run_demo() else 1)


def main() -> None:
    """Runs the command line; an error goes to stderr in one line, without a traceback unless --debug is given."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `<&-` in a shell
            setattr(sys, name, io.StringIO())
        elif sys.platform == "win32" and not stream.isatty():  # pipes and files would have the system's code page
            stream.reconfigure(encoding="utf-8")
    try:
        app()
    except Exception as error:
        if _is_debugging:
            raise
        package = sys.modules.get("hugging_nano_gpt")
        is_ours = package is not None and isinstance(error, package.NanoGPTError)
        text = " ".join(str(error).split())
        print(
            f"error: {text}" if is_ours else f"error: {type(error).__name__}: {text}; --debug shows where",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()

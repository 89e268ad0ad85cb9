"""The command line, `hugging-nano-gpt`: parse, call one library function, print.

It lies beside the package and imports it only when a command runs: importing the package imports torch and registers
the Auto classes, and --help should answer at once.
"""

import io
import json
import platform
import re
import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="nanoGPT checkpoints as native Transformers models, and back, with every number the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


_is_debugging = False


def _print_version(context: typer.Context, is_wanted: bool) -> None:
    if is_wanted:
        print("\n".join(_list_versions()) if context.params["verbose"] else version("hugging-nano-gpt"))
        raise typer.Exit


def _list_versions() -> list[str]:
    """Lists what a report of a fault has to name."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    versions = [f"{package} {version(package)}" for package in ("hugging-nano-gpt", "torch", "transformers")]
    return [
        *versions,
        f"Python {platform.python_version()}",
        f"platform {platform.platform()}",
        f"device {device}{name}",
    ]


@app.callback()
def _set_up(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", is_eager=True, help="With --version: torch, Transformers, device and system too."),
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    if verbose:
        raise typer.BadParameter("expected --verbose only with --version")
    global _is_debugging
    _is_debugging = debug


class _Activation(StrEnum):
    """NanoGPTConfig's activations; importing them from there would import torch."""

    GELU = "gelu"
    GELU_NEW = "gelu_new"
    GELU_PYTORCH_TANH = "gelu_pytorch_tanh"


class _Dtype(StrEnum):
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class _Format(StrEnum):
    """export_model's formats; importing them from there would import torch."""

    GPT2 = "gpt2"
    GGUF = "gguf"
    ONNX = "onnx"


class _FileType(StrEnum):
    """export_gguf's types."""

    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


def _check_size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]B", text, re.IGNORECASE):
        raise typer.BadParameter(f"expected a number and a unit, as 5GB, got {text!r}")
    return text


_Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Checkpoint file, saved folder or hub id.")]
_Meta = Annotated[Path | None, typer.Option(metavar="FILE", help="The meta.pkl of the model's characters.")]
_Tokenizer = Annotated[
    str | None, typer.Option(metavar="NAME", help="A tiktoken encoding, or a folder or hub id of a tokenizer.")
]
_ActivationOption = Annotated[
    _Activation | None, typer.Option(help="GELU of checkpoint files, in place of what their age tells.")
]
_Heads = Annotated[int | None, typer.Option(min=1, help="Heads, for files that do not record them.")]
_IgnoreExtra = Annotated[
    bool, typer.Option("--ignore-extra", help="Leave out of account what a fork has added to its checkpoints.")
]
_DtypeOption = Annotated[_Dtype | None, typer.Option(help="Dtype of the weights, in place of the file's.")]
_Device = Annotated[
    str | None, typer.Option(help="Device of torch, as cuda:1 or mps; CUDA where there is a GPU for it.")
]
_Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
_Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Checkpoint of nanoGPT, minGPT, build-nanogpt or llm.c; or a folder or hub id.")
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write.")],
    meta: _Meta = None,
    tokenizer: _Tokenizer = None,
    dtype: _DtypeOption = None,
    activation: _ActivationOption = None,
    n_head: _Heads = None,
    ignore_extra: _IgnoreExtra = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", callback=_check_size, help="Largest file of weights, as 5GB.")
    ] = "50GB",
    force: _Force = False,
) -> None:
    """Convert a checkpoint to a folder that Transformers loads anywhere, ready for the Hub. GPT-2 is taken in too."""
    _set_up_transformers()
    from hugging_nano_gpt import convert_to_folder

    conversion = convert_to_folder(
        source,
        out_dir,
        meta_path=meta,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        overwrite=force,
        **_select_given(dtype=dtype, activation_function=activation, n_head=n_head, ignore_extra=ignore_extra),
    )
    print(conversion)


@app.command()
def back(
    source: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="Saved folder or hub id; GPT-2's too.")],
    ckpt: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint file to write.")],
    best_val_loss: Annotated[
        float | None, typer.Option(help="In place of the recorded one: train.py saves only below it.")
    ] = None,
    optimizer_from: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="Checkpoint whose AdamW moments go on; fresh ones without it.")
    ] = None,
    force: _Force = False,
) -> None:
    """Convert a folder back to a checkpoint that nanoGPT's train.py resumes and its sample.py reads."""
    _set_up_transformers()
    from hugging_nano_gpt import convert_to_checkpoint

    model = convert_to_checkpoint(
        source, ckpt, best_val_loss=best_val_loss, optimizer_from=optimizer_from, overwrite=force
    )
    iter_num = model.nanogpt_training_state.iter_num
    optimizer = "a fresh optimizer state" if optimizer_from is None else f"the optimizer state of {optimizer_from}"
    print(f"Wrote {ckpt}: {model.num_parameters():,} parameters, iteration {iter_num:,}, {optimizer}")


@app.command()
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
    meta: _Meta = None,
    tokenizer: _Tokenizer = None,
    dtype: _DtypeOption = None,
    activation: _ActivationOption = None,
    n_head: _Heads = None,
    ignore_extra: _IgnoreExtra = False,
    file_type: Annotated[
        _FileType | None, typer.Option(help="Type of the weights in a gguf file; f32 if none.")
    ] = None,
    force: _Force = False,
) -> None:
    """Export a model, with its tokenizer, to the layout of another program, which then needs none of this package."""
    _set_up_transformers()
    from hugging_nano_gpt import export_model

    conversion = export_model(
        source,
        out,
        to=to.value,
        meta_path=meta,
        tokenizer=tokenizer,
        overwrite=force,
        **_select_given(
            dtype=dtype,
            activation_function=activation,
            n_head=n_head,
            ignore_extra=ignore_extra,
            file_type=file_type,
        ),
    )
    print(conversion)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE_OR_DIR", help="Checkpoint file or saved folder.")],
    activation: _ActivationOption = None,
    n_head: _Heads = None,
    ignore_extra: _IgnoreExtra = False,
    as_json: _Json = False,
) -> None:
    """Tell what a checkpoint or a folder holds: its age, sizes, parameters, training state, and what was assumed."""
    _set_up_transformers()
    from hugging_nano_gpt import inspect_path

    found = inspect_path(
        path, activation_function=activation and activation.value, n_head=n_head, ignore_extra=ignore_extra
    )
    _print_result(found, as_json)


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint file, saved folder or hub id.")],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="What to compare it with.")] = None,
    nanogpt: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare with a checkout of nanoGPT: this runs its model.py.")
    ] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare gradients too.")] = False,
    activation: _ActivationOption = None,
    n_head: _Heads = None,
    ignore_extra: _IgnoreExtra = False,
    as_json: _Json = False,
) -> None:
    """Prove that two models are the same: tensors, logits, loss and greedy tokens. Exits with 1 if they are not."""
    if (b is None) == (nanogpt is None):
        raise typer.BadParameter("expected exactly one of B and --nanogpt")
    _set_up_transformers(is_quiet=True)  # what Transformers would warn of, the report or the error says
    from hugging_nano_gpt import verify_against_nanogpt, verify_models

    settings = {
        "activation_function": activation and activation.value,
        "n_head": n_head,
        "ignore_extra": ignore_extra,
    }
    if nanogpt is not None:
        report = verify_against_nanogpt(a, nanogpt, gradients=gradients, **settings)
    else:
        report = verify_models(a, b, gradients=gradients, **settings)
    _print_result(report, as_json)
    raise typer.Exit(0 if report.is_equal else 1)


@app.command()
def evaluate(
    source: _Source,
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Token file (.bin, .npy), folder with val.bin, or any other file: text."),
    ],
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from a window to the next; block_size if none.")
    ] = None,
    eval_iters: Annotated[
        int | None, typer.Option(min=1, help="Batches of nanoGPT's estimate, in place of the run's own.")
    ] = None,
    meta: _Meta = None,
    tokenizer: _Tokenizer = None,
    dtype: _DtypeOption = None,
    device: _Device = None,
    activation: _ActivationOption = None,
    n_head: _Heads = None,
    ignore_extra: _IgnoreExtra = False,
    expect_recorded: Annotated[
        bool, typer.Option("--expect-recorded", help="Exit with 1 unless the estimate agrees with the best_val_loss.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Tell the loss over every token of a file, its perplexity and bits per byte, and nanoGPT's own estimate."""
    if expect_recorded and not (data.is_dir() or data.name == "val.bin"):
        raise typer.BadParameter("expected --expect-recorded only with val.bin, whose loss train.py records")
    _set_up_transformers(is_quiet=True)
    from hugging_nano_gpt import evaluate_loss

    evaluation = evaluate_loss(
        source,
        data,
        stride=stride,
        eval_iters=eval_iters,
        device=device,
        meta_path=meta,
        tokenizer=tokenizer,
        **_select_given(dtype=dtype, activation_function=activation, n_head=n_head, ignore_extra=ignore_extra),
    )
    _print_result(evaluation, as_json)
    raise typer.Exit(1 if expect_recorded and not evaluation.matches_recorded else 0)


@app.command()
def generate(
    source: _Source,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to go on from, or FILE:name; without it, standard input, or else a newline."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each, past block_size too.")] = 500,
    temperature: Annotated[float, typer.Option(min=0, help="Divides the logits; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest tokens to choose among; 0 for all.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 1337,
    stride: Annotated[int, typer.Option(min=1, help="Tokens dropped at once past block_size; 1 as nanoGPT.")] = 1,
    meta: _Meta = None,
    tokenizer: _Tokenizer = None,
    dtype: _DtypeOption = None,
    device: _Device = None,
    activation: _ActivationOption = None,
    n_head: _Heads = None,
    ignore_extra: _IgnoreExtra = False,
) -> None:
    """Draw text as nanoGPT's sample.py does: the same settings by default, the same text from the same seed."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    _set_up_transformers(is_quiet=True)
    from hugging_nano_gpt import sample_text

    sample_text(
        source,
        prompt or "\n",
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stride=stride,
        device=device,
        meta_path=meta,
        tokenizer=tokenizer,
        **_select_given(dtype=dtype, activation_function=activation, n_head=n_head, ignore_extra=ignore_extra),
    )


# As train.py has it: a flag for each setting, which the library knows and typer passes on.
@app.command(context_settings={"ignore_unknown_options": True})
def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="SETTINGS", help="CONFIG.py and --key=value, as train.py takes them, in any number."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in out_dir; begin if none is there.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite what an earlier run left in out_dir, and --folder.")
    ] = False,
    report_to: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Log to tensorboard, wandb or trackio; may be repeated.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for Transformers to write with every ckpt.pt.")
    ] = None,
    loss_chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens whose logits are in memory at once; all without it.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice in place of keeping them.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16, on a CPU too.")] = False,
    fsdp: Annotated[
        bool,
        typer.Option("--fsdp", help="Under torchrun: split parameters and moments between the processes (FSDP2)."),
    ] = False,
) -> None:
    """Train as nanoGPT's train.py does: its settings, its lines, its ckpt.pt, bit for bit; and go on after a kill."""
    _set_up_transformers(has_progress=False, is_quiet=True)
    from hugging_nano_gpt.training import leave_processes, read_settings, run_training

    with leave_processes():
        run_training(
            read_settings(settings or []),
            resume=resume,
            force=force,
            report_to=report_to or "none",
            folder=folder,
            loss_chunk_size=loss_chunk_size,
            gradient_checkpointing=gradient_checkpointing,
            bf16=bf16,
            fsdp=fsdp,
            has_bar=sys.stderr.isatty(),
        )


@app.command()
def playground(
    source: Annotated[
        str | None, typer.Argument(help="Checkpoint file, saved folder or hub id; the bundled model without it.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of 127.0.0.1 to listen on.")] = 7860,
    meta: _Meta = None,
    tokenizer: _Tokenizer = None,
    dtype: _DtypeOption = None,
    device: _Device = None,
    activation: _ActivationOption = None,
    n_head: _Heads = None,
    ignore_extra: _IgnoreExtra = False,
) -> None:
    """Try a model in the browser: its text as it is drawn, and what else it could have drawn. Until Ctrl-C."""
    _set_up_transformers(is_quiet=True)
    from hugging_nano_gpt import run_playground

    run_playground(
        source,
        port=port,
        device=device,
        meta_path=meta,
        tokenizer=tokenizer,
        **_select_given(dtype=dtype, activation_function=activation, n_head=n_head, ignore_extra=ignore_extra),
    )


@app.command()
def serve(
    source: _Source,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; the others get the status 503.")] = 32,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of all answers to a request, and of a prompt.")
    ] = 4096,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", envvar="HUGGING_NANO_GPT_API_KEY", help="Key to ask for; or in HUGGING_NANO_GPT_API_KEY."
        ),
    ] = None,
    allow_origin: Annotated[
        str | None, typer.Option(metavar="ORIGIN", help="Web page that may ask, as http://localhost:3000.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log no line for each request.")] = False,
    meta: _Meta = None,
    tokenizer: _Tokenizer = None,
    dtype: _DtypeOption = None,
    device: _Device = None,
    activation: _ActivationOption = None,
    n_head: _Heads = None,
    ignore_extra: _IgnoreExtra = False,
) -> None:
    """Serve a model as OpenAI's API does: completions and chats, streamed too. Until Ctrl-C."""
    _set_up_transformers(is_quiet=True)
    from hugging_nano_gpt import run_server

    run_server(
        source,
        host=host,
        port=port,
        queue=queue,
        max_tokens=max_tokens,
        api_key=api_key,
        allow_origin=allow_origin,
        quiet=quiet,
        device=device,
        meta_path=meta,
        tokenizer=tokenizer,
        **_select_given(dtype=dtype, activation_function=activation, n_head=n_head, ignore_extra=ignore_extra),
    )


@app.command()
def demo() -> None:
    """Take the bundled nanoGPT checkpoint through the whole round trip and prove every step equal."""
    _set_up_transformers(has_progress=False)
    from hugging_nano_gpt.demo import run_demo

    raise typer.Exit(0 if run_demo() else 1)


def _print_result(result: Any, as_json: bool) -> None:
    print(json.dumps(result.to_json(), indent=2, allow_nan=False) if as_json else result)


def _select_given(**settings: Any) -> dict[str, Any]:
    """Leaves out what was not given, and takes the words out of enumerations."""
    return {name: getattr(value, "value", value) for name, value in settings.items() if value is not None}


def _set_up_transformers(has_progress: bool = True, is_quiet: bool = False) -> None:
    from transformers.utils import logging

    if is_quiet:
        logging.set_verbosity_error()
        logging.get_logger("hugging_nano_gpt").setLevel("ERROR")
    if not (has_progress and sys.stderr.isatty()):
        logging.disable_progress_bar()


def main() -> None:
    """Runs the command line; an error goes to stderr in one line, without a traceback unless --debug is given."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as `<&-` in a shell does it
            setattr(sys, name, io.StringIO())
        elif sys.platform == "win32" and not stream.isatty():  # else pipes and files have the system's code page
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

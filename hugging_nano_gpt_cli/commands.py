"""The commands: each calls one function of the library, which it imports only then."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    COMPUTING,
    FORCE,
    LOADING,
    PREPARING,
    READING,
    SAMPLING,
    SERVING,
    TRAINING,
    FileType,
    Format,
    Json,
    Source,
    check_size,
    option,
)
from .program import command, print_result


@command(*PREPARING, has_progress=False, is_quiet=True)
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Text files, or a folder of .txt; .jsonl, .csv or .parquet files; or a data set of the Hub.",
        ),
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write, such as data/mine.")],
    *,
    quiet: bool,
    **options: Any,
) -> None:
    """Make train.bin and val.bin of a text or documents, with the bytes of nanoGPT's prepare.py, and its tokenizer."""
    from hugging_nano_gpt import prepare_data

    prepare_data(sources, out_dir, **options, has_bar=sys.stderr.isatty() and not quiet, has_notes=not quiet)


@command(
    *LOADING,
    option("max_shard_size", str, metavar="SIZE", callback=check_size, default="50GB", help="Largest weights file."),
    FORCE,
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


@command(
    option("best_val_loss", float | None, help="Instead of the recorded one: train.py saves only below it."),
    option("optimizer_from", Path | None, metavar="CKPT", help="Checkpoint to take AdamW's moments from."),
    FORCE,
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


@command(
    *LOADING,
    option("file_type", FileType | None, help="Type of the weights in a gguf file; by default f32."),
    FORCE,
)
def export(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder or file to write.")],
    to: Annotated[
        Format,
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


@command(*READING)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE_OR_DIR", help="Checkpoint file or saved folder.")],
    as_json: Json = False,
    **options: Any,
) -> None:
    """Describe a checkpoint or a folder: its age, sizes, parameters, training state, and what was assumed."""
    from hugging_nano_gpt import inspect_path

    print_result(inspect_path(path, **options), as_json)


# What Transformers would warn about is in the report or the error.
@command(*READING, is_quiet=True)
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint file, saved folder or hub id.")],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="What to compare it with.")] = None,
    nanogpt: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare with a checkout of nanoGPT: this runs its model.py.")
    ] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare gradients too.")] = False,
    as_json: Json = False,
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
    print_result(report, as_json)
    raise typer.Exit(0 if report.is_equal else 1)


@command(
    *COMPUTING,
    option("stride", int | None, min=1, help="Tokens from a window to the next; by default block_size."),
    option("eval_iters", int | None, min=1, help="Batches of nanoGPT's estimate, instead of the run's own."),
    is_quiet=True,
)
def evaluate(
    source: Source,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Token file (.bin, .npy), folder with val.bin or its shards, or any other file: text."
        ),
    ],
    expect_recorded: Annotated[
        bool, typer.Option("--expect-recorded", help="Exit with 1 unless the estimate agrees with the best_val_loss.")
    ] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Compute the loss over every token of a file, its perplexity and bits per byte, and nanoGPT's own estimate."""
    if expect_recorded and not (data.is_dir() or data.name == "val.bin"):
        raise typer.BadParameter("expected --expect-recorded only with val.bin, whose loss train.py records")
    from hugging_nano_gpt import evaluate_loss

    evaluation = evaluate_loss(source, data, **options)
    print_result(evaluation, as_json)
    raise typer.Exit(1 if expect_recorded and not evaluation.matches_recorded else 0)


@command(*SAMPLING, *COMPUTING, is_quiet=True)
def generate(
    source: Source,
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
@command(*TRAINING, has_progress=False, is_quiet=True, context_settings={"ignore_unknown_options": True})
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


@command(FORCE, has_progress=False)
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


@command(
    option("port", int, min=1, max=65535, default=7860, help="Port of 127.0.0.1 to listen on."),
    *COMPUTING,
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


@command(*SERVING, *COMPUTING, is_quiet=True)
def serve(source: Source, *, quiet: bool, **options: Any) -> None:
    """Serve a model with OpenAI's API: completions and chats, streamed too. Until Ctrl-C."""
    from hugging_nano_gpt import run_server

    run_server(source, quiet=quiet, **options)


@command(has_progress=False)
def demo() -> None:
    """Take the bundled nanoGPT checkpoint through the whole round trip and prove every step equal."""
    from hugging_nano_gpt.demo import run_demo

    raise typer.Exit(0 if run_demo() else 1)

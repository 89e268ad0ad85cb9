"""The options of the commands, each declared once, under the name of the library's argument."""

import inspect
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

# Choices of the library; importing them from there would import torch.
Activation = StrEnum("_Activation", {name: name for name in ("gelu", "gelu_new", "gelu_pytorch_tanh")})
Dtype = StrEnum("_Dtype", {name: name for name in ("float32", "float16", "bfloat16")})
Format = StrEnum("_Format", {name: name for name in ("gpt2", "gguf", "onnx")})
FileType = StrEnum("_FileType", {name: name for name in ("f32", "f16", "q8_0")})


def option(name: str, kind: Any, *flags: str, default: Any = None, **info: Any) -> inspect.Parameter:
    """Makes an option of a command, under the name of the library's argument; the flag is --name if none is given."""
    annotation = Annotated[kind, typer.Option(*flags, **info)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def switch(name: str, flag: str, help_text: str) -> inspect.Parameter:
    return option(name, bool, flag, default=False, help=help_text)


def check_size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]B", text, re.IGNORECASE):
        raise typer.BadParameter(f"expected a number and a unit, as 5GB, got {text!r}")
    return text


Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Checkpoint file, saved folder or hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FORCE = switch("overwrite", "--force", "Overwrite existing files.")
QUIET = switch("quiet", "--quiet", "No notes, progress or log lines on standard error.")

# How to read a checkpoint file, how to load a model with its tokenizer, and where to compute with it.
READING = (
    option("activation_function", Activation | None, "--activation", help="GELU of a file, instead of its era's."),
    option("n_head", int | None, min=1, help="Heads, for files that do not record them."),
    switch("ignore_extra", "--ignore-extra", "Ignore what a fork has added to its checkpoints."),
)
LOADING = (
    option("meta_path", Path | None, "--meta", metavar="FILE", help="The meta.pkl of the model's characters."),
    option("tokenizer", str | None, metavar="NAME", help="A tiktoken encoding, or a tokenizer's folder or hub id."),
    option("dtype", Dtype | None, help="Dtype of the weights, instead of the file's."),
    *READING,
)
COMPUTING = (
    *LOADING,
    option("device", str | None, help="Device of torch, such as cuda:1 or mps; by default CUDA if there is a GPU."),
)
SAMPLING = (
    option("num_samples", int, min=1, default=10, help="Number of samples."),
    option("max_new_tokens", int, min=1, default=500, help="Most tokens of each sample, past block_size too."),
    option("temperature", float, min=0, default=0.8, help="Divides the logits; 0 is greedy."),
    option("top_k", int, min=0, default=200, help="Number of likeliest tokens to sample from; 0 for all."),
    option("seed", int, default=1337, help="Seed of the random numbers."),
    option("stride", int, min=1, default=1, help="Tokens dropped at once past block_size; 1 as nanoGPT."),
    switch("ignore_eos", "--ignore-eos", "Go on after the end token, as sample.py."),
)
PREPARING = (
    option(
        "tokenizer",
        str,
        metavar="NAME",
        default="gpt2",
        help="char; a tiktoken encoding; bpe:N, which trains one of N tokens; or a tokenizer's folder or hub id.",
    ),
    option("column", str | None, metavar="NAME", help="Column with the texts of documents; by default text."),
    option("num_proc", int | None, min=1, help="Threads that encode; the bytes are the same for any number."),
    option("shard_size", int | None, min=1, help="Tokens of a shard, to write train_000000.bin and so on."),
    FORCE,
)
TRAINING = (
    switch("resume", "--resume", "Continue from the last checkpoint in out_dir; without one, start."),
    switch("force", "--force", "Overwrite what an earlier run left in out_dir, and --folder."),
    option("report_to", list[str] | None, metavar="NAME", help="Log to tensorboard, wandb or trackio; repeatable."),
    option("folder", Path | None, metavar="DIR", help="Folder for Transformers to write with every ckpt.pt."),
    option("loss_chunk_size", int | None, min=1, help="Tokens whose logits are in memory at once; by default all."),
    switch("gradient_checkpointing", "--gradient-checkpointing", "Recompute activations instead of storing them."),
    switch("bf16", "--bf16", "Compute in bfloat16, on a CPU too."),
    switch("fsdp", "--fsdp", "Under torchrun: shard parameters and moments over the processes (FSDP2)."),
)
SERVING = (
    option("host", str, default="127.0.0.1", help="Address to listen on; 0.0.0.0 or :: for other machines."),
    option("port", int, min=1, max=65535, default=8000, help="Port to listen on."),
    option("queue", int, min=1, default=32, help="Requests that may wait; the others get the status 503."),
    option("max_tokens", int, min=1, default=4096, help="Most tokens of all answers to a request, and of a prompt."),
    option(
        "api_key",
        str | None,
        metavar="KEY",
        envvar="HUGGING_NANO_GPT_API_KEY",
        help="Key to require; or in HUGGING_NANO_GPT_API_KEY.",
    ),
    option("allow_origin", str | None, metavar="ORIGIN", help="Web page that may ask, as http://localhost:3000."),
)

"""llm.c's .bin checkpoints (karpathy/llm.c train_gpt2.py, write_model): read, and written byte for byte the same.

A header of 256 little-endian int32: magic, version (3 float32, 5 bfloat16), max_seq_len, vocab_size, n_layer, n_head,
n_embd, padded vocab_size, and zeros; then the parameters, kind by kind, each kind for all layers. The model always has
biases, a tied head and the tanh GELU. There is no checksum: a flipped bit in a weight goes unseen.
"""

import math
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from ..files.files import measure_bytes
from .contents import Checkpoint, ReadingOptions
from .faults import find_args_faults
from .file import CheckpointFile
from .layout import iterate_shapes, list_parameter_shapes

NAME, KIND = "llmc", "llm.c checkpoint"

_MAGIC = 20240326
_HEADER_INTS = 256
_DTYPES = {3: torch.float32, 5: torch.bfloat16}

# After the two embeddings: each kind for layers 0 to n_layer - 1, then the last norm.
_LAYER_KINDS = (
    *(f"ln_1.{part}" for part in ("weight", "bias")),
    *(f"attn.{layer}.{part}" for layer in ("c_attn", "c_proj") for part in ("weight", "bias")),
    *(f"ln_2.{part}" for part in ("weight", "bias")),
    *(f"mlp.{layer}.{part}" for layer in ("c_fc", "c_proj") for part in ("weight", "bias")),
)


def recognise(file: CheckpointFile) -> bool:
    """Returns whether a file begins as llm.c's checkpoints do."""
    file.raw.seek(0)
    return file.raw.read(4) == _MAGIC.to_bytes(4, "little")


def read(file: CheckpointFile, options: ReadingOptions) -> Checkpoint:
    """Reads an llm.c checkpoint, which records all that an option could say, after comparing its header and length.

    Padding rows of the embedding are kept, so that the way back is exact; `n_tokens` says where they begin.

    Raises:
        CheckpointError: If the header is impossible or the file is not exactly as long as the header says.
    """
    raw = file.raw
    raw.seek(0)
    header = np.frombuffer(raw.read(4 * _HEADER_INTS).ljust(4 * _HEADER_INTS, b"\0"), dtype="<i4").tolist()
    model_args, dtype, n_tokens = _parse_header(file, header)
    expected, found = 4 * _HEADER_INTS + _count_stored(model_args) * dtype.itemsize, measure_bytes(raw)
    if found != expected:  # checked before anything of the size that the header says is made
        raise file.fail_damaged(f"{found} bytes where its header says {expected}")
    shapes = dict(iterate_shapes(model_args))
    tensors = {}
    for name in iterate_names(model_args["n_layer"]):
        tensor = torch.empty(shapes[name], dtype=dtype)
        if raw.readinto(_view_bytes(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
            raise file.fail_damaged("an early end of the file")
        tensors[name] = tensor
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return Checkpoint(
        model_args=model_args,
        state_dict={name: tensors[name] for name in shapes},
        activation_function="gelu_new",
        n_tokens=n_tokens,
        assumptions=(
            "tanh GELU, as llm.c computes: the file does not record it",
            "dropout 0.0, as llm.c has none: the file does not record it",
        ),
    )


def write(checkpoint: Checkpoint, file: BinaryIO) -> None:
    """Writes an llm.c checkpoint in the dtype of its tensors; the caller has checked it with find_faults."""
    args = checkpoint.model_args
    dtype = checkpoint.state_dict["transformer.wte.weight"].dtype
    version = next(version for version, known in _DTYPES.items() if known == dtype)
    sizes = [args[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")]
    header = np.zeros(_HEADER_INTS, dtype="<i4")
    header[:8] = [_MAGIC, version, args["block_size"], checkpoint.n_tokens or args["vocab_size"], *sizes]
    file.write(header.tobytes())
    for name in iterate_names(args["n_layer"]):
        file.write(_view_bytes(checkpoint.state_dict[name].contiguous()))


def find_faults(checkpoint: Checkpoint) -> list[str]:
    """Finds what in a checkpoint llm.c cannot express."""
    faults = []
    if not checkpoint.model_args["bias"]:
        faults.append("bias: expected True, because llm.c's model always has biases, got False")
    if checkpoint.activation_function == "gelu":
        faults.append("activation_function: expected a tanh GELU, because llm.c computes no other, got 'gelu'")
    dtype = checkpoint.state_dict["transformer.wte.weight"].dtype
    if dtype not in _DTYPES.values():
        faults.append(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    return faults


def iterate_names(n_layer: int) -> Iterator[str]:
    """Yields the tensor names in llm.c's order; lm_head is the embedding and is not stored."""
    yield from ("transformer.wte.weight", "transformer.wpe.weight")
    for kind in _LAYER_KINDS:
        for layer in range(n_layer):
            yield f"transformer.h.{layer}.{kind}"
    yield from ("transformer.ln_f.weight", "transformer.ln_f.bias")


def _parse_header(file: CheckpointFile, header: list[int]) -> tuple[dict[str, Any], torch.dtype, int]:
    _, version, block_size, n_tokens, n_layer, n_head, n_embd, vocab_size, *rest = header
    faults = []
    if version not in _DTYPES:
        faults.append(f"version: expected 3 (float32) or 5 (bfloat16), got {version}")
    if not 1 <= n_tokens <= vocab_size:
        faults.append(f"vocab_size: expected 1 to {vocab_size}, the padded size, got {n_tokens}")
    if any(rest):
        faults.append("expected zeros after the eighth number, got others")
    sizes = {"block_size": block_size, "vocab_size": vocab_size}
    model_args = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **sizes, "bias": True, "dropout": 0.0}
    faults += find_args_faults(model_args)
    if faults:
        advice = "copy it again from where it was written"
        raise file.fail(f"its llm.c header is impossible: {'; '.join(faults)}", advice)
    return model_args, _DTYPES[version], n_tokens


def _count_stored(model_args: dict[str, Any]) -> int:
    """Returns the number of stored parameters, without a table of as many layers as the header says."""
    without, with_one = (
        sum(map(math.prod, list_parameter_shapes({**model_args, "n_layer": n}, is_tied=True).values())) for n in (0, 1)
    )
    return without + model_args["n_layer"] * (with_one - without)


def _view_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.view(torch.uint8).numpy())).cast("B")

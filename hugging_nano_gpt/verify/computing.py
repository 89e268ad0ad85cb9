"""Computes the numbers by which models are compared: in this process, or as a script that runs a user's nanoGPT.

The script runs in a separate process, and reads the weights from a safetensors file, so the user's code unpickles
nothing. It imports torch and safetensors but not this package. The same function computes both sides.

Shapes: B batch, T tokens, V vocabulary.
"""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Number of tokens that are generated greedily after the first token of each row.
N_GREEDY = 32

# nanoGPT's forward: takes idx and targets (B, T) int64, or None, and returns logits (B, T or 1, V) and the loss.
Forward = Callable[[torch.Tensor, torch.Tensor | None], tuple[Any, Any]]
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


def compute_numbers(
    forward: Forward,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    batches: Batches,
    block_size: int,
    with_gradients: bool,
) -> dict[str, torch.Tensor]:
    """Computes logits and loss of every batch, greedy tokens, and gradients.

    Args:
        forward: The model, in eval mode.
        named_parameters: Its parameters.
        batches: idx and targets of each batch, (B, T) int64 each.
        block_size: Longest sequence of the model.
        with_gradients: Whether to compute the gradient of the last batch's loss with respect to every parameter.

    Returns:
        "logits/BxT" (B, T, V) and "loss/BxT" () of each batch, "tokens" (B, N_GREEDY) int64, "margins" (B, N_GREEDY)
        float32, and "gradient/<name>" in the shape of the parameter.
    """
    numbers = {}
    with torch.no_grad():
        for idx, targets in batches:
            size = f"{idx.shape[0]}x{idx.shape[1]}"
            logits, loss = forward(idx, targets)
            # Copies, because a view would keep the whole tensor in memory, and cannot be saved.
            numbers[f"logits/{size}"], numbers[f"loss/{size}"] = logits.clone(), loss.clone()
        numbers["tokens"], numbers["margins"] = _continue_greedily(forward, batches[0][0][:, :1], block_size)
    if with_gradients:
        loss = forward(*batches[-1])[1]
        loss.backward()
        numbers |= {f"gradient/{name}": p.grad.clone() for name, p in named_parameters if p.grad is not None}
    return numbers


def _continue_greedily(forward: Forward, idx: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends the most likely token N_GREEDY times, without a cache, cropping the context as nanoGPT's generate does.

    Returns:
        The tokens, and by how much the logit of each exceeds the next one, relative to the largest in magnitude.
    """
    margins = []
    for _ in range(N_GREEDY):
        logits = forward(idx[:, -block_size:], None)[0][:, -1].float()  # (B, V)
        first, second = logits.topk(2).values.unbind(-1) if logits.shape[-1] > 1 else (logits[:, 0],) * 2
        margins.append((first - second) / logits.abs().amax(-1))
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    return idx[:, 1:].clone(), torch.stack(margins, dim=1)


def main() -> None:
    """Reads a request, computes it with the model.py of a folder, and writes the answer; takes their three paths."""
    nanogpt_dir, request_path, answer_path = map(Path, sys.argv[1:])
    with safe_open(request_path, framework="pt") as file:
        request = json.loads(file.metadata()["request"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    torch.set_num_threads(request["n_threads"])
    given = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    if request["is_tied"]:
        given["lm_head.weight"] = given["transformer.wte.weight"]
    module = _import_model(nanogpt_dir)
    known = inspect.signature(module.GPTConfig).parameters
    unknown_args = {name: value for name, value in request["model_args"].items() if name not in known}
    config = module.GPTConfig(**{name: value for name, value in request["model_args"].items() if name in known})
    model = module.GPT(config).eval()

    answer: dict[str, Any] = {"unknown_args": unknown_args, **_compare_names(given, model)}
    numbers = {}
    if not any(answer[kind] for kind in ("missing", "unexpected", "shapes")):
        model.load_state_dict(given, strict=False)  # not strict: some versions have mask buffers, which are not given
        answer["changed"] = _find_changed(given, model)
        batches = [(tensors[f"idx/{i}"], tensors[f"targets/{i}"]) for i in range(request["n_batches"])]
        block_size, with_gradients = request["model_args"]["block_size"], request["with_gradients"]
        numbers = compute_numbers(model, model.named_parameters(), batches, block_size, with_gradients)
    save_file(numbers or {"none": torch.zeros(1)}, answer_path, {"answer": json.dumps(answer)})


def _import_model(nanogpt_dir: Path) -> ModuleType:
    sys.path.insert(0, str(nanogpt_dir))  # model.py may import other files of its folder
    spec = importlib.util.spec_from_file_location("model", nanogpt_dir / "model.py")
    assert spec is not None  # never None for a path that ends in .py
    assert spec.loader is not None
    module = sys.modules["model"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _compare_names(given: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, Any]:
    """Lists the parameters that only one side has, and those with another shape."""
    theirs = dict(model.named_parameters(remove_duplicate=False))  # tied parameters under both names
    return {
        "missing": [name for name in theirs if name not in given],
        "unexpected": [name for name in given if name not in theirs],
        "is_tied": theirs.get("lm_head.weight") is theirs.get("transformer.wte.weight"),
        "shapes": {
            name: [list(t.shape), list(theirs[name].shape)]
            for name, t in given.items()
            if name in theirs and t.shape != theirs[name].shape
        },
    }


def _find_changed(given: Mapping[str, torch.Tensor], model: torch.nn.Module) -> list[str]:
    """Lists the parameters without the bits that were loaded into them, as when the code ties two of them."""
    theirs = dict(model.named_parameters(remove_duplicate=False))
    return [name for name, tensor in given.items() if not have_same_bits(tensor, theirs[name])]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def have_same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Returns whether two tensors have the same dtype, shape and bits: 0.0 is not -0.0, and NaNs may differ."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(view_bits(left), view_bits(right))


def view_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bits of a tensor as integers of the same size."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


if __name__ == "__main__":
    main()

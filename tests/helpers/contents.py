"""Contents of a ckpt.pt as train.py writes them, with values that are no defaults, and a pickle that runs code."""

import os
from pathlib import Path
from typing import Any

import torch

from .tiny import MODEL_ARGS


def make_contents(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Makes the dict that train.py saves, after one AdamW step; written out here to be independent of the package."""
    torch.manual_seed(0)
    C, T, V = MODEL_ARGS["n_embd"], MODEL_ARGS["block_size"], MODEL_ARGS["vocab_size"]
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    for layer in range(MODEL_ARGS["n_layer"]):
        linear = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shapes[f"transformer.h.{layer}.{name}.weight"] = linear.get(name, (C,))
            shapes[f"transformer.h.{layer}.{name}.bias"] = linear.get(name, (C,))[:1]
    shapes |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    model = {name: torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in shapes.items()}

    decayed, others = [p for p in model.values() if p.ndim >= 2], [p for p in model.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-4)  # 1e-8 is 0 in float16
    for parameter in model.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    state_dict = {name: parameter.detach() for name, parameter in model.items()}
    state_dict["lm_head.weight"] = state_dict["transformer.wte.weight"]
    return {
        "model": state_dict,
        "optimizer": optimizer.state_dict(),
        "model_args": dict(MODEL_ARGS),
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"out_dir": "out", "learning_rate": 1e-3, "compile": True, "init_from": "scratch", "seeds": [1, 2]},
    }


def save(contents: Any, folder: Path) -> Path:
    """Writes contents as train.py does; returns the path."""
    path = folder / "ckpt.pt"
    torch.save(contents, path)
    return path


class Malicious:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def swap(tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


WTE, HEAD = "transformer.wte.weight", "lm_head.weight"

"""Records a run of nanoGPT's train.py from scratch: NANOGPT_DIR=... python -m tests.record_training.

The file contains a few numbers of every tensor of its ckpt.pt, weights and moments: enough to detect another run.
"""

import json
import tempfile
from pathlib import Path

import torch

from .helpers.scripts import link_scripts, run_script
from .helpers.tiny import FIXTURES_DIR
from .helpers.toy_run import SETTINGS, flatten_checkpoint, make_workplace

FIXTURE_PATH = FIXTURES_DIR / "run.json"

CHANGES = {"max_iters": 40, "eval_interval": 8, "lr_decay_iters": 40, "learning_rate": 1e-3, "min_lr": 1e-4}


def summarize(path: Path) -> dict[str, list[float]]:
    """Returns the mean, the root mean square and three single numbers of everything in a ckpt.pt."""
    return {
        name: [tensor.double().mean().item(), tensor.double().square().mean().sqrt().item()]
        + [tensor.flatten()[len(tensor.flatten()) * part // 4].item() for part in (0, 1, 3)]
        for name, tensor in flatten_checkpoint(path).items()
    }


def record() -> None:
    """Runs train.py and writes the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_workplace(Path(name))
        link_scripts(folder)
        run_script(folder, "train.py", *(f"--{name}={value}" for name, value in {**SETTINGS, **CHANGES}.items()))
        numbers = summarize(folder / "out" / "ckpt.pt")
    FIXTURE_PATH.write_text(json.dumps({"torch": torch.__version__, "changes": CHANGES, "numbers": numbers}, indent=1))


if __name__ == "__main__":
    record()

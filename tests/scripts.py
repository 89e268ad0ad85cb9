"""nanoGPT's own scripts, run as they are in a folder of links to the checkout that NANOGPT_DIR names."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hugging_nano_gpt import Checkpoint, read_checkpoint

from .trace import CONFIG, TRACE_DIR, list_offsets

NANOGPT_DIR = os.environ.get("NANOGPT_DIR")

skip_without_nanogpt = pytest.mark.skipif(not NANOGPT_DIR, reason="NANOGPT_DIR names no checkout of karpathy/nanoGPT")

SCRIPTS = ("model.py", "train.py", "sample.py", "configurator.py")

# Runs train.py with offsets from a file in place of its first random ones, on the two threads of the recorded run.
REPLAY = """
import json, pathlib, runpy, sys, torch

offsets = [torch.tensor(batch) for batch in json.loads(pathlib.Path("offsets.json").read_text())]
draw = torch.randint
torch.randint = lambda *args, **kwargs: offsets.pop(0) if offsets else draw(*args, **kwargs)
torch.set_num_threads(2)
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
assert not offsets, f"{len(offsets)} recorded batches were not used"
"""


def link_scripts(folder: Path) -> None:
    """Links nanoGPT's scripts into a folder, with a stand-in for tiktoken."""
    assert NANOGPT_DIR is not None
    for script in SCRIPTS:
        (folder / script).symlink_to(Path(NANOGPT_DIR) / script)
    (folder / "tiktoken.py").write_text("# sample.py imports it, but a character model does not use it\n")


def run_script(workplace: Path, script: str, *flags: str) -> str:
    """Runs a script in a folder made by link_scripts; returns what it prints."""
    # Python looks for model.py beside the script that the link leads to, and for our tiktoken.py on PYTHONPATH.
    environment = {**os.environ, "PYTHONPATH": str(workplace), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *flags]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def resume_trace(workplace: Path, steps: Sequence[Mapping[str, Any]]) -> Checkpoint:
    """Lets train.py go on from out/ckpt.pt with the recorded batches of some updates; returns what it then writes."""
    (workplace / "data").mkdir(exist_ok=True)
    (workplace / "data" / CONFIG["dataset"]).unlink(missing_ok=True)
    (workplace / "data" / CONFIG["dataset"]).symlink_to(TRACE_DIR)
    (workplace / "offsets.json").write_text(json.dumps(list_offsets(steps)))
    (workplace / "replay.py").write_text(REPLAY)
    # It evaluates and saves when eval_interval divides the number of updates made, before it makes the next one.
    end = steps[-1]["iter"] + 1
    changes = {"out_dir": "out", "init_from": "resume", "eval_interval": end, "max_iters": end, "eval_iters": 1}
    run_script(workplace, "replay.py", *(f"--{name}={value}" for name, value in {**CONFIG, **changes}.items()))
    return read_checkpoint(workplace / "out" / "ckpt.pt")

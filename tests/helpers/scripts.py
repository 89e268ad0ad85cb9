"""nanoGPT's own scripts, run unchanged in a folder of links to the checkout that NANOGPT_DIR names."""

import contextlib
import io
import os
import runpy
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hugging_nano_gpt import Checkpoint, read_checkpoint

from .trace import CONFIG, TRACE_DIR, list_offsets

NANOGPT_DIR = os.environ.get("NANOGPT_DIR")

skip_without_nanogpt = pytest.mark.skipif(not NANOGPT_DIR, reason="NANOGPT_DIR names no checkout of karpathy/nanoGPT")

SCRIPTS = ("model.py", "train.py", "sample.py", "configurator.py")

# The modules that the scripts import from their folder.
MODULES = ("model", "tiktoken")


def link_scripts(folder: Path) -> None:
    """Links nanoGPT's scripts into a folder, with an empty module instead of tiktoken."""
    assert NANOGPT_DIR is not None
    for script in SCRIPTS:
        (folder / script).symlink_to(Path(NANOGPT_DIR) / script)
    (folder / "tiktoken.py").write_text("# sample.py imports it, but a character model does not use it\n")


def run_script(workplace: Path, script: str, *flags: str, n_threads: int = 1) -> str:
    """Runs a script in a folder made by link_scripts, in this process; returns what it prints."""
    output = io.StringIO()
    with (
        contextlib.chdir(workplace),
        contextlib.redirect_stdout(output),
        mock.patch.multiple(sys, argv=[script, *flags], path=[str(workplace), *sys.path]),
        warnings.catch_warnings(),
        keep_settings(),
    ):
        warnings.simplefilter("ignore")  # about names that torch has changed since
        torch.set_num_threads(n_threads)
        runpy.run_path(script, run_name="__main__")
    return output.getvalue()


@contextlib.contextmanager
def keep_settings() -> Iterator[None]:
    """Undoes what a script does to torch and to the modules of this process."""
    n_threads, modules = torch.get_num_threads(), {name: sys.modules.pop(name, None) for name in MODULES}
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    settings = [backend.allow_tf32 for backend in backends]
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        for backend, allow_tf32 in zip(backends, settings, strict=True):
            backend.allow_tf32 = allow_tf32
        for name, module in modules.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def resume_trace(workplace: Path, steps: Sequence[Mapping[str, Any]]) -> Checkpoint:
    """Continues from out/ckpt.pt with train.py and the recorded batches of some updates; returns what it writes."""
    (workplace / "data").mkdir(exist_ok=True)
    (workplace / "data" / CONFIG["dataset"]).unlink(missing_ok=True)
    (workplace / "data" / CONFIG["dataset"]).symlink_to(TRACE_DIR)
    # train.py evaluates and saves when eval_interval divides the number of updates made, before the next one.
    end = steps[-1]["iter"] + 1
    changes = {"out_dir": "out", "init_from": "resume", "eval_interval": end, "max_iters": end, "eval_iters": 1}
    flags = [f"--{name}={value}" for name, value in {**CONFIG, **changes}.items()]
    offsets, draw = [torch.tensor(batch) for batch in list_offsets(steps)], torch.randint
    with mock.patch.object(
        torch, "randint", lambda *args, **kwargs: offsets.pop(0) if offsets else draw(*args, **kwargs)
    ):
        run_script(workplace, "train.py", *flags, n_threads=2)  # as many as the recorded run had
    assert not offsets, f"{len(offsets)} recorded batches were not used"
    return read_checkpoint(workplace / "out" / "ckpt.pt")

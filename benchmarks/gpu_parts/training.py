"""NanoGPTTrainer on the device: its overhead over a plain loop, kill and resume, FSDP2 on one device."""

import contextlib
import importlib.util
import io
import os
import signal
import socket
import tempfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from trainer import MOST_OVERHEAD, measure_trainer
from transformers import TrainerCallback

from hugging_nano_gpt import read_checkpoint

from .probe import Outcome, Probe, Setting, SkippedError, deterministic, run_apart

LIMIT_S = 110.0
N_UPDATES = 12
SAVED_AT = 5
KILLED_AT = 8

# Two processes, or a sharded gradient, add sums in another order; on CPUs the difference is 1e-6
# (tests/helpers/trace.py).
TOLERANCE = 1e-4

Parameters = dict[str, torch.Tensor]


class KilledError(Exception):
    """Raised instead of a signal if no process may be killed."""


class KillAt(TrainerCallback):
    """Kills the process after an update, like a machine that goes down, or raises KilledError."""

    def __init__(self, update: int, is_process: bool):
        self.update, self.is_process = update, is_process

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update:
            if self.is_process:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KilledError


def probe_overhead(setting: Setting) -> Outcome:
    """Times updates of NanoGPTTrainer and of a loop in train.py's style, in turns."""
    check_accelerate()
    sizes, batch = setting.sizes("shakespeare"), setting.choose(64, 4)
    n_updates, rounds = setting.choose(40, 2), setting.choose(3, 1)
    times = measure_trainer(sizes, n_updates, rounds, device=setting.device, dtype="bfloat16", batch_size=batch)
    with deterministic():
        exact = measure_trainer(sizes, 3, 1, device=setting.device, dtype="bfloat16", batch_size=batch)
    figures = {name: value for name, value in times.items() if name != "is_trainer_at_the_bits_of_the_loop"}
    is_same = exact["is_trainer_at_the_bits_of_the_loop"]
    figures["bitwise with deterministic algorithms"] = is_same
    is_true = is_same and (setting.is_toy or times["trainer_overhead"] <= MOST_OVERHEAD)
    return Outcome(is_true, f"the loop's bits, in at most {MOST_OVERHEAD:.0%} more time", figures)


def probe_resume(setting: Setting) -> Outcome:
    """Kills a run between two of its checkpoints, resumes it, and compares it with an undisturbed run."""
    check_accelerate()
    with deterministic(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        is_killed = False
        try:
            if setting.has_children:
                run_apart(train, setting, folder, KILLED_AT)
            else:
                train(setting, folder, KILLED_AT)
        except (BrokenProcessPool, KilledError):
            is_killed = True
        saved = sorted(path.name for path in folder.glob("checkpoint-*"))
        resumed = train(setting, folder, resume=True)
        alone = train(setting, folder / "alone")
    figures = {
        "was killed": is_killed,
        "checkpoints there were": ", ".join(saved),
        "largest difference of a parameter": find_difference(resumed, alone),
    }
    is_true = is_killed and saved == [f"checkpoint-{SAVED_AT}"] and figures["largest difference of a parameter"] == 0.0
    return Outcome(is_true, f"killed at update {KILLED_AT} and resumed from {SAVED_AT}: the same bits", figures)


def probe_fsdp(setting: Setting) -> Outcome:
    """Trains with Trainer's fsdp argument (FSDP2) on one device, and compares it with training without it."""
    check_accelerate()
    if not setting.has_children:
        raise SkippedError("it needs a process of its own")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters, kind = run_apart(train_sharded, setting, folder)
        written = dict(read_checkpoint(folder / "ckpt.pt").state_dict)
        alone = train(setting, folder / "alone")
    figures = {
        "a parameter in training": kind,
        "largest difference of a parameter": find_difference(parameters, alone),
        "its checkpoint has its parameters": find_difference(written, parameters) == 0.0,
    }
    is_true = (
        kind == "DTensor"
        and figures["its checkpoint has its parameters"]
        and figures["largest difference of a parameter"] <= TOLERANCE
    )
    return Outcome(is_true, f"sharded by FSDP2, within {TOLERANCE:g} of training without it", figures)


def check_accelerate() -> None:
    """Raises SkippedError if Trainer cannot run."""
    if importlib.util.find_spec("accelerate") is None:
        raise SkippedError("accelerate is missing")


def train(
    setting: Setting, folder: Path, killed_at: int | None = None, resume: bool = False, **settings: Any
) -> Parameters:
    """Repeats recorded updates with NanoGPTTrainer; returns the parameters."""
    trainer = make_trainer(setting, folder, **settings)
    if killed_at is not None:
        trainer.add_callback(KillAt(killed_at, is_process=setting.has_children))
        torch.use_deterministic_algorithms(True)
    with contextlib.redirect_stdout(io.StringIO()):  # its logs
        trainer.train(resume_from_checkpoint=resume or None)
    return {name: parameter.detach().cpu() for name, parameter in trainer.model.named_parameters()}


def make_trainer(setting: Setting, folder: Path, **settings: Any) -> Any:
    """Makes a trainer for the recorded run's first updates, which saves once."""
    from tests.helpers import trace

    place = {
        "use_cpu": setting.device == "cpu",
        "torch_compile": False,
        "save_strategy": "steps",
        "save_steps": SAVED_AT,
    }
    kept = {
        "save_total_limit": 1,
        "logging_strategy": "no",
        "report_to": "none",
        "tf32": False,
    }  # the same sums in each process
    return trace.make_trainer(folder, trace.load_start(), trace.STEPS[:N_UPDATES], **{**place, **kept, **settings})


def train_sharded(setting: Setting, folder: Path) -> tuple[Parameters, str]:
    """Makes the same updates with FSDP2 in a group of one process; returns the parameters, and the type of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in ranks.items()}})
    kinds: list[str] = []

    class NoteKind(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            kinds.append(type(next(iter(model.parameters()))).__name__)

    wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["NanoGPTBlock"]}
    trainer = make_trainer(setting, folder, fsdp=True, fsdp_config=wrap, save_strategy="no")
    trainer.add_callback(NoteKind())
    trainer.train()
    trainer.save_nanogpt_ckpt(folder / "ckpt.pt")
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in trainer.model.named_parameters()}
    torch.distributed.destroy_process_group()
    return {name: parameter.detach().cpu() for name, parameter in whole.items()}, kinds[-1]


def find_difference(found: Parameters, expected: Parameters) -> float:
    """Returns the largest difference of parameters with the same name, without the tied head's second name."""
    names = [name for name in expected if name != "lm_head.weight"]
    return float(torch.stack([(found[name] - expected[name]).abs().max() for name in names]).max())


PROBES: dict[str, Probe] = {
    "against a bare loop": probe_overhead,
    "FSDP2 on one device": probe_fsdp,
    "killed and resumed": probe_resume,
}

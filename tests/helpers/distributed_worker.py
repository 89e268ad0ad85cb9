"""One process of test_distributed.py: makes updates together with the other process, then writes a checkpoint.

processes.py calls main in each of two processes. In the folder FOLDER/STRATEGY, ckpt-0.pt is the checkpoint, which
only the first process writes, and state.pt has the parameters and moments, gathered by torch's own functions.
The strategies whose names start with `train` are toy runs of train.py's settings, in out/.
"""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard

from hugging_nano_gpt.training import collate_windows, make_optimizer, read_optimizer

from .toy_run import signalled, train
from .trace import CONFIG, START, STEPS, load_start, make_trainer, train_by_hand

N_UPDATES = 20

# For the toy run. Without dropout, because two processes draw other masks than one. Without biases, because the
# gradient of the keys' bias consists of rounding errors, which AdamW divides by their own size.
CHANGES = {"dropout": 0.0, "bias": False, "max_iters": N_UPDATES, "eval_interval": 10, "lr_decay_iters": N_UPDATES}

# Settings that save memory, for the first updates of the toy run.
WAYS = {"lean": {"loss_chunk_size": 7, "gradient_checkpointing": True}, "bf16": {"bf16": True}}
SHORT = {**CHANGES, "max_iters": 4, "eval_interval": 4}
LONGER = {**SHORT, "max_iters": 8}

# Older Transformers load the moments of several CPU processes under DDP to "cpu:0", which torch does not know.
CAN_RESUME = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 19)

# Long enough for a busy machine, short enough that a process whose peer has died ends before the tests.
TIMEOUT_S = 60


def train_with_ddp(folder: Path, rank: int, world_size: int) -> None:
    """Makes the updates with NanoGPTTrainer, which gives each process one of the two micro-steps."""
    trainer = make_trainer(folder, load_start(), STEPS[:N_UPDATES], ddp_timeout=TIMEOUT_S, logging_strategy="no")
    trainer.train()
    assert dist.get_world_size() == world_size
    save_state(folder, trainer.model, trainer.optimizer.optimizer)
    trainer.evaluate()
    trainer.save_nanogpt_ckpt(folder / f"ckpt-{rank}.pt")


def train_with_fsdp2(folder: Path, rank: int, world_size: int) -> None:
    """Makes the updates in a plain loop on sharded parameters; each process has half of the rows of each batch."""
    model = load_start().train()
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    assert_amsgrad_is_sharded_and_gathered(model)
    optimizer = make_optimizer(model, state=START.training_state.optimizer)
    share = CONFIG["batch_size"] // world_size
    train_by_hand(model, optimizer, STEPS[:N_UPDATES], slice(rank * share, (rank + 1) * share))
    save_state(folder, model, optimizer)

    with torch.no_grad():  # an evaluation, after which FSDP2 leaves the root's parameters unsharded
        model.eval()(**collate_windows([{name: torch.arange(8) for name in ("input_ids", "shift_labels")}]))
    state = read_optimizer(optimizer, model)
    model.to_nanogpt_ckpt(folder / f"ckpt-{rank}.pt", optimizer=state, iter_num=100 + N_UPDATES)


def assert_amsgrad_is_sharded_and_gathered(model: torch.nn.Module) -> None:
    """Asserts that AdamW's third moment, which nanoGPT does not use, is gathered too."""
    state = START.training_state.optimizer
    moments = {name: {**kept, "max_exp_avg_sq": 2 * kept["exp_avg_sq"]} for name, kept in state.moments.items()}
    settings = ({**state.settings[0], "amsgrad": True}, {**state.settings[1], "amsgrad": True})
    optimizer = make_optimizer(model, state=replace(state, settings=settings, moments=moments))
    assert all(hasattr(kept["max_exp_avg_sq"], "full_tensor") for kept in optimizer.state.values())
    found = read_optimizer(optimizer, model)
    assert all(group["amsgrad"] for group in found.settings)
    assert all(
        torch.equal(found.moments[name][key], value) for name in moments for key, value in moments[name].items()
    )


def run_toy(folder: Path, fsdp: bool) -> None:
    """Makes the toy run, stopped by a signal to one process and resumed; with FSDP also its first updates in WAYS."""
    if CAN_RESUME or fsdp:
        is_signalled = dist.get_rank() == 1
        with signalled(signal.SIGTERM, 13) if is_signalled else nullcontext(), pytest.raises(SystemExit) as stopped:
            train(folder, fsdp=fsdp, **CHANGES)
        assert stopped.value.code == 143
        found = {path.name for path in (folder / "out").iterdir()}
        assert found == {".train.lock", "ckpt.pt", "checkpoint-13", "log.jsonl"}
    trainer = train(folder, fsdp=fsdp, resume=True, **CHANGES)
    assert all(hasattr(parameter, "full_tensor") is fsdp for parameter in trainer.model.parameters())
    for name, flags in WAYS.items() if fsdp else ():
        train(folder, fsdp=fsdp, out_dir=name, **flags, **SHORT)


def run_compiled_toy(folder: Path) -> None:
    """Makes the toy run sharded and compiled, stopped and resumed."""
    compiler = torch.compile
    with mock.patch.object(
        torch, "compile", lambda model, **_: compiler(model, backend="eager")
    ):  # the fastest to compile
        train(folder, fsdp=True, compile=True, **SHORT)
        train(folder, fsdp=True, compile=True, resume=True, **LONGER)


def save_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Saves parameters and moments by name."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parameters, state = get_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save({"parameters": parameters, "moments": state["state"]}, folder / "state.pt")


STRATEGIES: dict[str, Callable[[Path, int, int], None]] = {
    "ddp": train_with_ddp,
    "fsdp2": train_with_fsdp2,
    "train": lambda folder, *_: run_toy(folder, fsdp=False),
    "train-fsdp2": lambda folder, *_: run_toy(folder, fsdp=True),
    "train-compiled": lambda folder, *_: run_compiled_toy(folder),
}


def main(folder: str, *strategies: str) -> None:
    """Runs the strategies one after another."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    for name in strategies:
        STRATEGIES[name](Path(folder) / name, dist.get_rank(), dist.get_world_size())
        dist.barrier()
    dist.destroy_process_group()

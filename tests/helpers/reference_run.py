"""An independent run in train.py's order (karpathy/nanoGPT train.py @ 3adf61e), of tests/helpers/reference.py.

It shares no code with the package, so the results of the package's runs can be compared with it bit for bit on any
machine. tests/training/test_run.py compares the package with train.py itself.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .reference import ReferenceGPT

SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")


class ReferenceRun:
    """A run from scratch or from what an earlier run saved, of one process or of several that are computed in one.

    Args:
        settings: Every setting of the run, under train.py's names.
        data_dir: Folder of train.bin and val.bin.
        vocab_size: Rows of the embedding.
        saved: What an earlier run saved, to resume from.
        is_late: Whether all micro-steps' batches are drawn before the first forward pass, which is wrong.
        n_first: Batches drawn before the loop; train.py draws one.
        n_processes: Processes that share the micro-steps, each with its own seed; only without dropout.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        data_dir: Path,
        vocab_size: int,
        saved: Mapping[str, Any] | None = None,
        is_late: bool = False,
        n_first: int = 1,
        n_processes: int = 1,
    ):
        self.settings = settings
        self.tokens = {split: np.fromfile(data_dir / f"{split}.bin", dtype=np.uint16) for split in ("train", "val")}
        self.is_late = is_late
        self.generators = [torch.default_generator, *(torch.Generator() for _ in range(1, n_processes))]
        for rank in reversed(range(n_processes)):
            torch.manual_seed(1337 + rank)
            self.model = ReferenceGPT(vocab_size=vocab_size, **{name: settings[name] for name in SHAPE})
            self.model.draw_weights()
            self.generators[rank].set_state(torch.get_rng_state())
        groups = [[p for p in self.model.parameters() if (p.ndim >= 2) is is_matrix] for is_matrix in (True, False)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group, "weight_decay": decay}
                for group, decay in zip(groups, (settings["weight_decay"], 0.0), strict=True)
            ],
            lr=settings["learning_rate"],
            betas=(settings["beta1"], settings["beta2"]),
        )
        self.iter_num, self.best_val_loss, self.saved = 0, 1e9, None
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
            self.iter_num, self.best_val_loss = saved["iter_num"], saved["best_val_loss"]
        self.losses: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        for _ in range(n_first):
            self.batches = [self.draw("train", rank) for rank in range(n_processes)]

    def draw(self, split: str, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws idx and targets, (B, T) int64 each."""
        tokens, length = self.tokens[split], self.settings["block_size"]
        size = (self.settings["batch_size"],)
        offsets = torch.randint(len(tokens) - length, size, generator=self.generators[rank])
        rows = torch.from_numpy(np.stack([tokens[i : i + length + 1] for i in offsets.tolist()]).astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def run(self) -> "ReferenceRun":
        """Makes all updates."""
        while self.iter_num <= self.settings["max_iters"]:
            if self.iter_num % self.settings["eval_interval"] == 0:
                self.evaluate()
            self.update()
            self.iter_num += 1
        return self

    @torch.no_grad()
    def evaluate(self) -> None:
        """Estimates both losses, and stores a copy of what train.py would save."""
        self.model.eval()
        means = {}
        for split in ("train", "val"):
            losses = torch.zeros(self.settings["eval_iters"])
            for number in range(len(losses)):
                losses[number] = self.model(*self.draw(split))[1].item()
            means[split] = losses.mean().item()
        self.model.train()
        self.evaluations.append(means)
        if means["val"] < self.best_val_loss or self.settings["always_save_checkpoint"]:
            self.best_val_loss = means["val"]
            if self.iter_num > 0:
                kept = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
                kept = {**kept, "iter_num": self.iter_num, "best_val_loss": self.best_val_loss}
                self.saved = copy.deepcopy(kept)

    def update(self) -> None:
        """Makes one update: a forward pass, the next batch, a backward pass for each micro-step."""
        micro_steps = self.settings["gradient_accumulation_steps"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.compute_lr()
        early = [self.draw("train") for _ in range(micro_steps)] if self.is_late else []
        for number in range(micro_steps):
            rank = number % len(self.batches)
            loss = self.model(*self.batches[rank])[1] / micro_steps
            self.batches[rank] = early.pop(0) if early else self.draw("train", rank)
            loss.backward()
        if self.settings["grad_clip"] != 0.0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["grad_clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item() * micro_steps)

    def compute_lr(self) -> float:
        """Returns the learning rate of the next update."""
        highest, lowest, warmup = (self.settings[name] for name in ("learning_rate", "min_lr", "warmup_iters"))
        end = self.settings["lr_decay_iters"]
        if not self.settings["decay_lr"]:
            return highest
        if self.iter_num < warmup:
            return highest * (self.iter_num + 1) / (warmup + 1)
        if self.iter_num > end:
            return lowest
        return lowest + 0.5 * (1.0 + math.cos(math.pi * (self.iter_num - warmup) / (end - warmup))) * (
            highest - lowest
        )


def flatten_saved(run: ReferenceRun) -> dict[str, torch.Tensor]:
    """Returns what a run saved under the names of toy_run.flatten_checkpoint."""
    saved = run.saved
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    order = [names[id(parameter)] for group in run.optimizer.param_groups for parameter in group["params"]]
    moments = {
        f"{key} of {name}": saved["optimizer"]["state"][number][key]
        for number, name in enumerate(order)
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    counts = {"iter_num": torch.tensor(saved["iter_num"])}
    counts["best_val_loss"] = torch.tensor(saved["best_val_loss"]).double()
    return {**saved["model"], **moments, **counts}

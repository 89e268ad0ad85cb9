"""NanoGPTTrainer: nanoGPT's training loop inside Transformers' Trainer.

Everything that decides a number is nanoGPT's: the offsets of the batches, the mean of micro-step means, clipping, the
optimizer's groups, the schedule. Everything else is Trainer's: devices, precision, processes, logging, saving. The
replay of a recorded nanoGPT run ends at the same bits.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..checkpoint.contents import TrainingState
from ..convert.nanogpt import save_model
from .data import NANOGPT_SEED, RandomOffsetSampler, TokenDataset, check_ids, collate_windows
from .optimizer import load_moments, make_optimizer, read_optimizer
from .schedule import NanoGPTSchedule

# nanoGPT's number of batches for an estimate of the loss (train.py @ 3adf61e).
_EVAL_ITERS = 200

# Far from the seeds of training, rank by rank, so that evaluation does not see the windows that it trains on first.
_EVAL_SEED = NANOGPT_SEED + 1_000_000


class NanoGPTTrainer(Trainer):
    """Continues, or begins, a nanoGPT run.

    Args:
        model: A NanoGPTLMHeadModel.
        args: TrainingArguments, such as training_arguments_from_nanogpt makes. max_steps counts updates from now.
        train_dataset: Windows of train.bin.
        eval_dataset: Windows of val.bin; with it, evaluate() estimates both losses as nanoGPT does.
        training_state: Where the run stands: iter_num, best_val_loss, config and, to go on as if nothing had
            happened, the optimizer's moments. By default what the model remembers, without moments.
        train_batch_sampler: Yields the offsets of each micro-step's batch; nanoGPT's random ones by default.
        **kwargs: Passed to Trainer.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: TokenDataset,
        eval_dataset: TokenDataset | None = None,
        training_state: TrainingState | None = None,
        train_batch_sampler: Any = None,
        **kwargs: Any,
    ):
        remembered = getattr(model, "nanogpt_training_state", TrainingState())
        self.training_state: TrainingState = remembered if training_state is None else training_state
        self._train_batch_sampler = train_batch_sampler
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collate_windows,
            **kwargs,
        )

    @property
    def iter_num(self) -> int:
        """nanoGPT's count of updates: those before this trainer and its own."""
        return self.training_state.iter_num + self.state.global_step

    @property
    def best_val_loss(self) -> float:
        """Lowest validation loss so far, in nats per token, of the training state and all evaluations since."""
        logged = (entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry)
        return min([self.training_state.best_val_loss, *logged])

    @property
    def config(self) -> Mapping[str, Any]:
        """train.py's settings."""
        return self.training_state.config

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does; each process with dropout masks of its own, as in nanoGPT."""
        if self.args.world_size > 1:
            torch.manual_seed(NANOGPT_SEED + self.args.process_index)
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Serves each process its own random windows, as nanoGPT does, without sharding them again."""
        n_batches = self.args.max_steps * self.args.gradient_accumulation_steps
        sampler = self._train_batch_sampler or self._make_sampler(self.train_dataset, n_batches)
        return self._make_loader(self.train_dataset, sampler)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes nanoGPT's optimizer, with the moments of the training state if it has any."""
        if self.optimizer is None:
            state = self.training_state.optimizer
            if self.is_fsdp_enabled and state is not None:
                state = replace(state, moments={})  # Accelerate replaces the parameters: see create_scheduler
            self.optimizer = make_optimizer(model or self.model, self._settings(), state)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Makes nanoGPT's schedule, beginning at the training state's iter_num."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            optimizer = getattr(optimizer, "optimizer", optimizer)
            state = self.training_state.optimizer
            if self.is_fsdp_enabled and state is not None and state.moments:
                load_moments(optimizer, self.model, state)  # Trainer calls this once the parameters are sharded
            self.lr_scheduler = NanoGPTSchedule(optimizer, self._settings(), self.training_state.iter_num)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: TokenDataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Estimates the losses as nanoGPT's estimate_loss does: the mean over eval_iters random batches.

        Returns:
            eval_loss, and the same numbers under nanoGPT's names: train/loss and val/loss; in nats per token.
        """
        datasets = {"train": self.train_dataset, "val": eval_dataset or self.eval_dataset}
        losses = {split: self._estimate_loss(dataset) for split, dataset in datasets.items() if dataset is not None}
        metrics = {f"{split}/loss": loss for split, loss in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = losses.get("val", losses["train"])
        self.log({**metrics, "iter": self.iter_num})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_nanogpt_ckpt(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint from which nanoGPT's train.py resumes; under torchrun every process has to call this."""
        model = self.accelerator.unwrap_model(self.model)
        save_model(
            model,
            path,
            optimizer=None if self.optimizer is None else read_optimizer(self.optimizer, model),
            iter_num=self.iter_num,
            best_val_loss=self.best_val_loss,
            config=self.config,
        )

    def _settings(self) -> dict[str, Any]:
        # What the arguments say goes, for settings that both have; but a state with moments brings its own weight
        # decay and betas, as in train.py.
        arguments = {
            "learning_rate": self.args.learning_rate,
            "weight_decay": self.args.weight_decay,
            "beta1": self.args.adam_beta1,
            "beta2": self.args.adam_beta2,
        }
        return {**self.config, **arguments}

    def _estimate_loss(self, dataset: TokenDataset) -> float:
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        was_training = model.training
        model.eval()
        sampler = self._make_sampler(dataset, self.config.get("eval_iters", _EVAL_ITERS), _EVAL_SEED)
        losses = []
        for batch in self._make_loader(dataset, sampler):
            with self.compute_loss_context_manager():
                losses.append(model(**self._prepare_inputs(batch), use_cache=False).loss)
        model.train(was_training)
        mean = torch.stack(losses).mean()
        return float(self.accelerator.gather(mean).mean())

    def _make_sampler(self, dataset: TokenDataset, n_batches: int, seed: int = NANOGPT_SEED) -> RandomOffsetSampler:
        batch_size = self.args.per_device_train_batch_size
        return RandomOffsetSampler(dataset, batch_size, n_batches, seed, self.args.process_index)

    def _make_loader(self, dataset: TokenDataset, batch_sampler: Any) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=partial(
                _collate_checked, vocab_size=self.model.config.vocab_size, where=getattr(dataset, "path", dataset)
            ),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )


def _collate_checked(
    windows: Sequence[dict[str, torch.Tensor]], vocab_size: int, where: object
) -> dict[str, torch.Tensor]:
    batch = collate_windows(windows)
    check_ids(batch, vocab_size, where)
    return batch


class NanoGPTCheckpointCallback(TrainerCallback):
    """Writes a nanoGPT checkpoint whenever Trainer saves one of its own.

    Args:
        trainer: The trainer to which it is added.
        path: The ckpt.pt to write; it is replaced each time, as train.py replaces its own.
    """

    def __init__(self, trainer: NanoGPTTrainer, path: str | os.PathLike[str]):
        self.trainer = trainer
        self.path = path

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_nanogpt_ckpt(self.path)

"""NanoGPTTrainer: nanoGPT's training loop inside Transformers' Trainer.

Everything that decides a number is nanoGPT's: the offsets of the batches, the mean of micro-step means, clipping, the
optimizer's groups, the schedule. Everything else is Trainer's: devices, precision, processes, logging, saving. The
replay of a recorded nanoGPT run ends at the same bits.
"""

import contextlib
import os
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from ..checkpoint.contents import TrainingState
from ..convert.nanogpt import remember_training_state, save_model
from ..data.dataset import TokenDataset, collate_checked, collate_windows
from ..data.offsets import RandomOffsetSampler, SharedBatches
from ..tokenization.vocabulary import fit_vocabulary
from .adamw import load_moments, make_optimizer, read_optimizer
from .arguments import complete_arguments
from .callbacks import NumbersCallback
from .drawing import BatchesInTurn, DrawnBatches, send, write_next_batch
from .evaluation import estimate_losses
from .loggers import name_logs
from .refusals import refuse_ignored, refuse_several
from .schedule import NanoGPTSchedule
from .train_settings import TRAIN_DEFAULTS
from .trainer_checkpoint import choose_checkpoint, explain_full_disk, find_faults, read_counts

logger = logging.get_logger(__name__)


class NanoGPTTrainer(Trainer):
    """Continues a nanoGPT run, or begins one.

    Args:
        model: A NanoGPTLMHeadModel.
        args: TrainingArguments; max_steps counts updates from now. If training_arguments_from_nanogpt did not make
            them, learning rate, weight decay, betas and clipping at Transformers' defaults become those of config.
        train_dataset: Windows of train.bin.
        eval_dataset: Windows of val.bin; with it, evaluate() estimates both losses as nanoGPT does.
        training_state: iter_num, best_val_loss, config and the moments, without which AdamW begins afresh. By default
            what the model remembers, with the config that args were made from. Other settings are train.py's defaults.
        train_batch_sampler: Batches of offsets, one for each micro-step, the same in every process: processes take
            them in turn, as plain Trainer's do. By default they are drawn as in train.py, from torch's generator.
        random_state: State of torch's CPU generator when the run begins; by default see make_random_state.
        **kwargs: Passed to Trainer. generate follows a tokenizer as processing_class: see fit_vocabulary.
    """

    args: Any
    optimizer: Any
    lr_scheduler: Any
    control: Any
    micro_loss: torch.Tensor  # of the last micro-step, which is what train.py prints

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: TokenDataset,
        eval_dataset: TokenDataset | None = None,
        training_state: TrainingState | None = None,
        train_batch_sampler: Any = None,
        random_state: torch.Tensor | None = None,
        **kwargs: Any,
    ):
        if training_state is None:
            training_state = getattr(model, "nanogpt_training_state", TrainingState())
            asked = getattr(args, "nanogpt_config", {})
            training_state = replace(training_state, config={**training_state.config, **asked})
        self.training_state: TrainingState = training_state
        self._train_batch_sampler = train_batch_sampler
        self._n_taken_back = 0  # updates that loading the best model undid
        refuse_ignored(args, {**kwargs, "eval_dataset": eval_dataset})
        if isinstance(kwargs.get("processing_class"), PreTrainedTokenizerBase):  # perhaps with tokens for spare rows
            fit_vocabulary(model, kwargs["processing_class"])
        super().__init__(
            model=model,
            args=complete_arguments(args, training_state.config, None if train_batch_sampler else train_dataset),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **{**kwargs, "data_collator": collate_windows},
        )
        self.label_names = ["shift_labels"]  # of the windows, for predict()
        self._batches = DrawnBatches(train_dataset, model.config, self.args, random_state)
        self.add_callback(NumbersCallback(self, begin_drawing=self._begin_drawing))

    @property
    def iter_num(self) -> int:
        """nanoGPT's count of the updates that weights and moments have seen, in this run and before it."""
        return self.training_state.iter_num + self.state.global_step - self._n_taken_back

    @property
    def best_val_loss(self) -> float:
        """Validation loss in nats per token, as train.py keeps it: the lowest, or the last if it saves at each."""
        n_updates = self.state.global_step - self._n_taken_back
        entries = [entry for entry in self.state.log_history if entry.get("step", 0) <= n_updates]
        losses = [entry["val/loss"] for entry in entries if "val/loss" in entry]
        if losses and self.config.get("always_save_checkpoint", True):
            return losses[-1]
        return min([self.training_state.best_val_loss, *losses])  # NaN is never lower

    @property
    def config(self) -> Mapping[str, Any]:
        """train.py's settings."""
        return self.training_state.config

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does, with train.py's random numbers; called again, for max_steps updates more.

        Args:
            resume_from_checkpoint: One of Trainer's own checkpoints, or True for the last whole one in output_dir.
                Weights, moments and random numbers come from it; learning rate and schedule are those asked for now.
            *args, **kwargs: Passed to Trainer.

        Raises:
            CheckpointError: If the checkpoint is not whole, or none is.
        """
        self._resumed_from = choose_checkpoint(resume_from_checkpoint, self.args.output_dir)
        self._count_from(self._resumed_from)
        self._n_parameters = self.model.num_parameters(exclude_embeddings=True)
        output = super().train(None if self._resumed_from is None else str(self._resumed_from), *args, **kwargs)
        self._remember()
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as Trainer does; the folder records how many updates its weights have seen."""
        self._remember()
        with explain_full_disk(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def get_train_dataloader(self) -> DataLoader:
        """Serves the given batches. For drawn batches it only says their number: get_batch_samples serves them."""
        args, dataset = self.args, self.train_dataset
        n_batches = args.max_steps * args.gradient_accumulation_steps
        sampler: Any = RandomOffsetSampler(dataset, args.per_device_train_batch_size, n_batches)
        if self._train_batch_sampler is not None:
            sampler = SharedBatches(self._train_batch_sampler, args.process_index, args.world_size)
        vocab_size, where = self.model.config.vocab_size, getattr(dataset, "path", dataset)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=partial(collate_checked, vocab_size=vocab_size, where=where),
            generator=torch.Generator(),  # without one, iterating would draw a seed from the global generator
            num_workers=args.dataloader_num_workers,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[Any, Any]:
        """Serves the batches of an update; drawn ones in turn, as each is drawn after a forward pass."""
        if self._train_batch_sampler is not None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        return BatchesInTurn(self._batches, num_batches), None

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Computes the loss as Trainer does, then draws the next batch, before the backward pass as in train.py."""
        loss = super().compute_loss(model, *args, **kwargs)
        if model.training:
            self.micro_loss = loss.detach()
            if self._train_batch_sampler is None:
                self._batches.draw()
        return loss

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator as Trainer does, with FSDP on a CPU too, and with float32 parameters and gradients.

        Accelerate would make DDP of FSDP on a CPU, and round both to half precision on a GPU.
        """
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            for state in (self.accelerator.state, PartialState()):  # one copies it from the other repeatedly
                state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Autocasts as train.py does under FSDP, where Accelerate does not; elsewhere Accelerate does."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else contextlib.nullcontext()

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
        """Makes nanoGPT's schedule, which begins at the training state's iter_num."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            optimizer = getattr(optimizer, "optimizer", optimizer)
            state = self.training_state.optimizer
            if self.is_fsdp_enabled and state is not None and state.moments:
                load_moments(optimizer, self.model, state)  # Trainer calls this after the parameters are sharded
            self.lr_scheduler = NanoGPTSchedule(optimizer, self._settings(), self.training_state.iter_num)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: TokenDataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Estimates the losses as nanoGPT's estimate_loss does: the mean over eval_iters random batches.

        During training the batches are drawn when train.py draws them. At other times, and for another data set, they
        are those of train.py's first evaluation, and torch's generator is restored. Every process has to call this.

        Args:
            eval_dataset: A data set other than the trainer's own; it does not count in best_val_loss.
            ignore_keys: Not read.
            metric_key_prefix: Prefix of the metric; nothing counts in best_val_loss if it is not "eval".

        Returns:
            eval_loss, and for the trainer's own data sets train/loss and val/loss too; in nats per token.
        """
        refuse_several(eval_dataset)
        is_own = metric_key_prefix == "eval" and (eval_dataset is None or eval_dataset is self.eval_dataset)
        val: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        datasets: dict[str, Any] = {"train": self.train_dataset} if is_own or val is None else {}
        datasets |= {} if val is None else {"val": val}
        with contextlib.nullcontext() if is_own and self.is_in_train else self._batches.rewound():
            losses = estimate_losses(self, datasets, self.config.get("eval_iters", TRAIN_DEFAULTS["eval_iters"]))
        metrics = {f"{split}/loss": loss for split, loss in losses.items() if is_own}
        metrics[f"{metric_key_prefix}_loss"] = losses["train" if val is None else "val"]
        self.log({**metrics, "iter": self.iter_num})
        is_due = self.control.should_evaluate and not is_own  # the next line resets it
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_evaluate |= is_due
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as Trainer does; loggers show what train.py logs under its names."""
        super().log(name_logs(logs), start_time)

    def save_nanogpt_ckpt(self, path: str | os.PathLike[str], *, overwrite: bool | None = None) -> None:
        """Writes a checkpoint from which nanoGPT's train.py resumes; under torchrun every process has to call this.

        An existing file is replaced if overwrite is True, refused if False, and without it replaced with a warning.
        """
        optimizer = self.training_state.optimizer
        if self.optimizer is not None and (optimizer is None or any(self.optimizer.state.values())):
            optimizer = read_optimizer(self.optimizer, self.model)  # shards again what an evaluation has left whole
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        counts: dict[str, Any] = {"iter_num": self.iter_num, "best_val_loss": self.best_val_loss}
        save_model(model, path, optimizer=optimizer, config=self.config, overwrite=overwrite, **counts)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Returns what Trainer returns; Trainer would count the parameters each time, and wait for a GPU."""
        return 6 * inputs["input_ids"].numel() * self._n_parameters

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor) and self.args.device.type == "cuda" and data.device.type == "cpu":
            return send(data, self.args.device)
        return super()._prepare_input(data)

    def _count_from(self, folder: Path | None) -> None:
        """Sets where Trainer's count of updates begins: here, or where it began for a checkpoint of its own."""
        state = self.training_state
        if folder is None:
            state = replace(state, iter_num=self.iter_num, best_val_loss=self.best_val_loss)
        else:
            counts = read_counts(folder)
            begin = state.iter_num if counts.iter_num is None else counts.iter_num - counts.global_step
            if begin != state.iter_num and self.args.max_steps > 0:  # the run ends where it was asked to
                self.args = copy(self.args)
                self.args.max_steps += state.iter_num - begin
            state = replace(state, iter_num=begin)
        # an optimizer that has been made has later moments than the training state
        self.training_state = state if self.optimizer is None else replace(state, optimizer=None)
        self.state.global_step, self._n_taken_back = 0, 0

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with explain_full_disk(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the generators' states as Trainer does, and the batch drawn before an evaluation advanced them.

        After this, Trainer writes trainer_state.json and removes the checkpoints beyond save_total_limit. So this
        waits for all processes: the previous checkpoint stays until the new one is whole.
        """
        super()._save_rng_state(output_dir)
        args = self.args
        write_next_batch(Path(output_dir), self._batches.offsets, args.process_index, args.world_size)
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        """Loads the best weights as Trainer does, and their moments and count."""
        super()._load_best_model()
        folder = Path(str(self.state.best_model_checkpoint))
        self._n_taken_back = self.state.global_step - read_counts(folder).global_step
        if not find_faults(folder):
            self._load_optimizer_and_scheduler(str(folder))
            return
        logger.warning(f"{folder}: the best weights were saved without their moments: the optimizer begins afresh")
        self.optimizer = self.lr_scheduler = None
        self.training_state = replace(self.training_state, optimizer=None)

    def _remember(self) -> None:
        state = TrainingState(self.iter_num, self.best_val_loss, dict(self.config))
        remember_training_state(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), state)

    def _settings(self) -> dict[str, Any]:
        """Returns config with the arguments' values. A state with moments brings its own weight decay and betas."""
        args = self.args
        arguments = {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
        return {**self.config, **arguments, "beta1": args.adam_beta1, "beta2": args.adam_beta2}

    def _begin_drawing(self) -> None:
        self._batches.begin(self._resumed_from)

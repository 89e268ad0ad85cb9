"""NanoGPTTrainer: nanoGPT's training loop inside Transformers' Trainer.

Everything that decides a number is nanoGPT's: the offsets of the batches, the mean of micro-step means, clipping, the
optimizer's groups, the schedule. Everything else is Trainer's: devices, precision, processes, logging, saving. The
replay of a recorded nanoGPT run ends at the same bits.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ..checkpoint.contents import TrainingState
from ..convert.nanogpt import remember_training_state, save_model
from ..errors import ConversionError
from ..tokenization.vocabulary import fit_vocabulary
from .arguments import complete_arguments
from .configurator import TRAIN_DEFAULTS
from .data import RandomOffsetSampler, SharedBatches, TokenDataset, collate_checked, collate_windows
from .drawing import BatchesInTurn, DrawingCallback, DrawnBatches, draw_offsets, make_random_state, write_next_batch
from .evaluation import choose_datasets, estimate_losses, find_best_val_loss
from .names import name_logs
from .optimizer import load_moments, make_optimizer, read_optimizer
from .refusals import refuse_ignored, refuse_several
from .saving import explain_full_disk
from .schedule import NanoGPTSchedule
from .settings import SettingsCallback
from .sharding import ShardingTrainer
from .trainer_checkpoint import choose_checkpoint, find_faults, read_counts

logger = logging.get_logger(__name__)


class NanoGPTTrainer(ShardingTrainer):
    """Continues, or begins, a nanoGPT run.

    Args:
        model: A NanoGPTLMHeadModel.
        args: TrainingArguments, such as training_arguments_from_nanogpt makes. max_steps counts updates from now. In
            others, learning rate, weight decay, betas and clipping at Transformers' default become those of config.
        train_dataset: Windows of train.bin.
        eval_dataset: Windows of val.bin; with it, evaluate() estimates both losses as nanoGPT does.
        training_state: Where the run stands: iter_num, best_val_loss, config and, to go on as if nothing had
            happened, the optimizer's moments. By default what the model remembers, without moments, with the config
            that args were made from. What config lacks is train.py's default.
        train_batch_sampler: Yields the offsets of each micro-step's batch, the same in every process: they share them
            out in turn, as those of plain Trainer do. By default they are drawn as train.py draws them, from torch's
            global generator.
        random_state: State of torch's CPU generator when the run begins; by default train.py's, after it has seeded it
            and made a model of this configuration: see make_random_state.
        **kwargs: Passed to Trainer. A tokenizer as processing_class is what generate follows: see fit_vocabulary.
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
        self._random_state = random_state
        self._n_taken_back = 0  # updates that loading the best model undid
        refuse_ignored(args, {**kwargs, "eval_dataset": eval_dataset})
        if isinstance(kwargs.get("processing_class"), PreTrainedTokenizerBase):  # with tokens for spare rows, perhaps
            fit_vocabulary(model, kwargs["processing_class"])
        super().__init__(
            model=model,
            args=complete_arguments(args, training_state.config, None if train_batch_sampler else train_dataset),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **{**kwargs, "data_collator": collate_windows},
        )
        self.label_names = ["shift_labels"]  # of the windows, for predict()
        if self.args.n_gpu > 1:  # Trainer would split each batch over them by DataParallel, which nanoGPT never does
            raise ConversionError(
                f"NanoGPTTrainer: several GPUs in one process: expected one, got {self.args.n_gpu}; start it with "
                f"`torchrun --nproc-per-node={self.args.n_gpu}`, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        batch_size, vocab_size = self.args.per_device_train_batch_size, model.config.vocab_size
        self._batches = DrawnBatches(train_dataset, batch_size, vocab_size, self.args.device)
        self.add_callback(DrawingCallback(self))
        self.add_callback(SettingsCallback(self))

    @property
    def iter_num(self) -> int:
        """nanoGPT's count of the updates that weights and moments have seen: those before this run and its own."""
        return self.training_state.iter_num + self.state.global_step - self._n_taken_back

    @property
    def best_val_loss(self) -> float:
        """Validation loss in nats per token, as train.py keeps it: the lowest, or the last if it saves at each."""
        n_updates = self.state.global_step - self._n_taken_back
        history = [entry for entry in self.state.log_history if entry.get("step", 0) <= n_updates]
        return find_best_val_loss(self.training_state, history)

    @property
    def config(self) -> Mapping[str, Any]:
        """train.py's settings."""
        return self.training_state.config

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does; random numbers are drawn as in train.py, by each process its own.

        Called again, it goes on from where it ended, for max_steps updates more.

        Args:
            resume_from_checkpoint: One of Trainer's own checkpoints, or True for the last whole one in output_dir.
                Weights, moments and random numbers are its, learning rate and schedule are those asked for now.
            *args: Passed to Trainer.
            **kwargs: Passed to Trainer.

        Raises:
            CheckpointError: If the checkpoint is not whole, or none is.
        """
        self._resumed_from = choose_checkpoint(resume_from_checkpoint, self.args.output_dir)
        self._count_from(self._resumed_from)
        output = super().train(None if self._resumed_from is None else str(self._resumed_from), *args, **kwargs)
        self._remember()
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as Trainer does; the folder says how many updates its weights have seen."""
        self._remember()
        with explain_full_disk(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def get_train_dataloader(self) -> DataLoader:
        """Serves the given batches. Those that are drawn come from get_batch_samples, and this says their number."""
        args = self.args
        n_batches = args.max_steps * args.gradient_accumulation_steps
        sampler: Any = RandomOffsetSampler(self.train_dataset, args.per_device_train_batch_size, n_batches)
        if self._train_batch_sampler is not None:
            sampler = SharedBatches(self._train_batch_sampler, args.process_index, args.world_size)
        where, vocab_size = getattr(self.train_dataset, "path", self.train_dataset), self.model.config.vocab_size
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=partial(collate_checked, vocab_size=vocab_size, where=where),
            generator=torch.Generator(),  # or an iterator of the loader would draw its seed from the global one
            num_workers=args.dataloader_num_workers,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[Any, Any]:
        """Serves the micro-steps' batches of an update; drawn ones in turn, as each is drawn after a forward pass."""
        if self._train_batch_sampler is not None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        return BatchesInTurn(self._batches, num_batches), None

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Computes the loss as Trainer does, then draws the next batch, before the backward pass as train.py does."""
        loss = super().compute_loss(model, *args, **kwargs)
        if model.training:
            self.micro_loss = loss.detach()
            if self._train_batch_sampler is None:
                self._batches.draw()
        return loss

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

        During training the batches are drawn in train.py's turn. At other times, and of another data set, they are
        those of train.py's first evaluation, and torch's generator stays as it is. Every process has to call this.

        Args:
            eval_dataset: Another data set than the trainer's own, which does not count in best_val_loss.
            ignore_keys: Not read.
            metric_key_prefix: How the metric begins; with another than "eval", nothing counts in best_val_loss.

        Returns:
            eval_loss, and for the trainer's own data sets train/loss and val/loss too; in nats per token.

        Raises:
            ConversionError: If several data sets are given.
        """
        refuse_several(eval_dataset)
        is_own = metric_key_prefix == "eval" and (eval_dataset is None or eval_dataset is self.eval_dataset)
        datasets = choose_datasets(self, eval_dataset, is_own)
        batch_size = self.args.per_device_train_batch_size
        with contextlib.nullcontext() if is_own and self.is_in_train else self._begin_anew(batch_size):
            n_batches = self.config.get("eval_iters", TRAIN_DEFAULTS["eval_iters"])
            losses = estimate_losses(self, datasets, n_batches, batch_size)
        metrics = {f"{split}/loss": loss for split, loss in losses.items() if is_own}
        metrics[f"{metric_key_prefix}_loss"] = losses["val" if "val" in losses else "train"]
        self.log({**metrics, "iter": self.iter_num})
        is_due = self.control.should_evaluate and not is_own  # which the next line forgets
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_evaluate |= is_due
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as Trainer does; loggers show what train.py logs under its names."""
        super().log(name_logs(logs), start_time)

    def save_nanogpt_ckpt(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint from which nanoGPT's train.py resumes; under torchrun every process has to call this."""
        kept = self.training_state.optimizer
        is_made = self.optimizer is not None and (kept is None or any(self.optimizer.state.values()))
        # first, as it shards again what an evaluation has left whole
        optimizer = read_optimizer(self.optimizer, self.model) if is_made else kept
        save_model(
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
            path,
            optimizer=optimizer,
            iter_num=self.iter_num,
            best_val_loss=self.best_val_loss,
            config=self.config,
        )

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Returns what Trainer returns; it counts the parameters anew each time, which a GPU would wait for."""
        return 6 * inputs["input_ids"].numel() * self._n_parameters

    @cached_property
    def _n_parameters(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor) and self.args.device.type == "cuda" and data.device.type == "cpu":
            return data.pin_memory().to(self.args.device, non_blocking=True)  # as in train.py: nothing waits for it
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
        # an optimizer that is there has later moments than the training state
        self.training_state = state if self.optimizer is None else replace(state, optimizer=None)
        self.state.global_step, self._n_taken_back = 0, 0

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with explain_full_disk(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Keeps the generators' states as Trainer does, and the batch drawn before an evaluation moved them on.

        Trainer then writes trainer_state.json and removes what save_total_limit lets go. So this waits for all
        processes: until the new checkpoint is whole, the one before stays.
        """
        super()._save_rng_state(output_dir)
        args = self.args
        write_next_batch(Path(output_dir), self._batches.offsets, args.process_index, args.world_size)
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        """Loads the best weights as Trainer does, and what belongs to them: their moments and their count."""
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
        # What the arguments say goes, for settings that both have; but a state with moments brings its own weight
        # decay and betas, as in train.py.
        arguments = {
            "learning_rate": self.args.learning_rate,
            "weight_decay": self.args.weight_decay,
            "beta1": self.args.adam_beta1,
            "beta2": self.args.adam_beta2,
        }
        return {**self.config, **arguments}

    def _begin_drawing(self) -> None:
        """Draws train.py's first batch, and leaves torch's CPU generator where train.py then has it."""
        self._rewind_generator()
        self._batches.draw()

    @contextlib.contextmanager
    def _begin_anew(self, batch_size: int) -> Iterator[None]:
        """Lets torch's CPU generator be where train.py's first evaluation begins, then as it was."""
        with torch.random.fork_rng(devices=[]):
            self._rewind_generator()
            draw_offsets(self.train_dataset, batch_size)  # train.py's first batch
            yield

    def _rewind_generator(self) -> None:
        if self._random_state is None:
            self._random_state = make_random_state(self.model.config, self.args.process_index)
        torch.set_rng_state(self._random_state)

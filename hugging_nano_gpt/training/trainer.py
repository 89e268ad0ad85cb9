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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..checkpoint.contents import TrainingState
from ..convert.nanogpt import remember_training_state, save_model
from ..errors import ConversionError
from ..tokenization.vocabulary import fit_vocabulary
from .arguments import complete_arguments
from .configurator import TRAIN_DEFAULTS
from .data import RandomOffsetSampler, TokenDataset, collate_checked, collate_windows
from .drawing import BatchesInTurn, DrawingCallback, DrawnBatches, make_random_state, write_next_batch
from .evaluation import estimate_losses
from .optimizer import load_moments, make_optimizer, read_optimizer
from .schedule import NanoGPTSchedule
from .settings import SettingsCallback
from .trainer_checkpoint import choose_checkpoint, find_faults, read_counts

logger = logging.get_logger(__name__)


class NanoGPTTrainer(Trainer):
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
        train_batch_sampler: Yields the offsets of each micro-step's batch. By default they are drawn as train.py draws
            them, from torch's global generator.
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
        if isinstance(kwargs.get("processing_class"), PreTrainedTokenizerBase):  # with tokens for spare rows, perhaps
            fit_vocabulary(model, kwargs["processing_class"])
        super().__init__(
            model=model,
            args=complete_arguments(args, training_state.config, None if train_batch_sampler else train_dataset),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collate_windows,
            **kwargs,
        )
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
        best = self.training_state.best_val_loss
        is_last_kept = self.config.get("always_save_checkpoint", True)
        for entry in self.state.log_history:
            is_of_these_weights = entry.get("step", 0) <= self.state.global_step - self._n_taken_back
            if is_of_these_weights and "eval_loss" in entry and (is_last_kept or entry["eval_loss"] < best):
                best = entry["eval_loss"]
        return best

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
        super().save_model(output_dir, _internal_call)

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator as Trainer does, but that FSDP is FSDP on a CPU too, where Accelerate makes DDP of it.

        Parameters and gradients stay in float32 under FSDP, where Accelerate would round them to the half precision.
        """
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            for state in (self.accelerator.state, PartialState()):  # one takes it from the other, again and again
                state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Autocasts as train.py does under FSDP, where Accelerate does not; elsewhere it has done so."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else contextlib.nullcontext()

    def get_train_dataloader(self) -> DataLoader:
        """Serves the given batches. Those that are drawn come from get_batch_samples, and this says their number."""
        n_batches = self.args.max_steps * self.args.gradient_accumulation_steps
        sampler = self._train_batch_sampler or RandomOffsetSampler(
            self.train_dataset, self.args.per_device_train_batch_size, n_batches, rank=self.args.process_index
        )
        where, vocab_size = getattr(self.train_dataset, "path", self.train_dataset), self.model.config.vocab_size
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=partial(collate_checked, vocab_size=vocab_size, where=where),
            generator=torch.Generator(),  # or an iterator of the loader would draw its seed from the global one
            num_workers=self.args.dataloader_num_workers,
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

        During training the batches are drawn in train.py's turn. At other times they are those of train.py's first
        evaluation, and torch's generator stays as it is. Every process has to call this.

        Returns:
            eval_loss, and the same numbers under nanoGPT's names: train/loss and val/loss; in nats per token.
        """
        datasets = {"train": self.train_dataset, "val": eval_dataset or self.eval_dataset}
        datasets = {split: dataset for split, dataset in datasets.items() if dataset is not None}
        with contextlib.nullcontext() if self.is_in_train else torch.random.fork_rng(devices=[]):
            if not self.is_in_train:
                self._begin_drawing()
            n_batches = self.config.get("eval_iters", TRAIN_DEFAULTS["eval_iters"])
            losses = estimate_losses(self, datasets, n_batches, self.args.per_device_train_batch_size)
        metrics = {f"{split}/loss": loss for split, loss in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = losses.get("val", losses["train"])
        self.log({**metrics, "iter": self.iter_num})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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
        """Brings torch's CPU generator to where it is when train.py has drawn its first batch, and draws that."""
        if self._random_state is None:
            self._random_state = make_random_state(self.model.config, self.args.process_index)
        torch.set_rng_state(self._random_state)
        self._batches.draw()


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

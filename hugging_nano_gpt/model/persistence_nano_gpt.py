"""How nanoGPT models come from files and go back: checkpoints of nanoGPT, and folders of Transformers.

A saved folder holds the model's code and its card, so it works where hugging-nano-gpt is not installed. What reads and
writes checkpoints is in that package and imported by name when it is asked for. This file travels with saved models as
remote code.
"""

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .generation_nano_gpt import document_as

# Where a saved folder has the class for each Auto class; vLLM asks for AutoModel whatever was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_nano_gpt.NanoGPTConfig",
    "AutoModel": "modeling_nano_gpt.NanoGPTModel",
    "AutoModelForCausalLM": "modeling_nano_gpt.NanoGPTLMHeadModel",
    "AutoModelForSequenceClassification": "modeling_nano_gpt.NanoGPTForSequenceClassification",
}


class NanoGPTPersistence(PreTrainedModel):
    """Loading from a checkpoint, and saving with the code and a card beside the weights."""

    @classmethod
    @document_as(PreTrainedModel.from_pretrained.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any):
        _refuse_checkpoint(pretrained_model_name_or_path, cls.__name__)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_nanogpt_ckpt(cls, ckpt_path: str | os.PathLike[str], **kwargs: Any):
        """Loads a checkpoint that nanoGPT's train.py wrote.

        Every tensor is taken over bit for bit; nothing in the file is executed, and the optimizer state in it is not
        read. The model is in eval mode, as after from_pretrained, and is independent of the file from then on.

        Args:
            ckpt_path: Path of the ckpt.pt.
            **kwargs: `dropout`, `activation_function`, token ids and label settings go into the configuration in
                place of the checkpoint's; everything else is passed to from_pretrained (dtype, device_map,
                attn_implementation, quantization_config, ...). The default dtype is the checkpoint's. `n_head` for a
                file that does not record it, and `ignore_extra=True` for what a fork has added to its checkpoints.

        Returns:
            A model of this class. Its `nanogpt_training_state` holds the checkpoint's iter_num, best_val_loss and
            config, and `name_or_path` the path.

        Raises:
            CheckpointError: If the file is not a complete, undamaged nanoGPT checkpoint; every fault is listed.
            ImportError: If the model runs as remote code where hugging-nano-gpt is not installed.
        """
        return _require_package().load_model(cls, ckpt_path, **kwargs)

    @classmethod
    def from_nanogpt(cls, gpt, **kwargs: Any):
        """Makes a model that shares the tensors of a nanoGPT GPT in memory: what it learns, this model knows.

        Nothing is copied and no random number drawn, so it can be made in the middle of train.py, for cached generate,
        lm-eval, pipelines or push_to_hub. Its own dropout is off: it is in eval mode whatever the GPT is in.

        Args:
            gpt: nanoGPT's GPT, compiled or wrapped in DDP too.
            **kwargs: What NanoGPTConfig takes in place of the GPT's, such as `activation_function`.

        Raises:
            ConversionError: If it is no nanoGPT model, or its code has been changed.
            ImportError: If the model runs as remote code where hugging-nano-gpt is not installed.
        """
        return _require_package().share_model(cls, gpt, **kwargs)

    @property
    def nanogpt_training_state(self):
        """A TrainingState: where the nanoGPT run stood that this model came from. None without hugging-nano-gpt."""
        package = _find_package()
        return None if package is None else package.read_training_state(self.config)

    @document_as(PreTrainedModel.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args, **kwargs):
        # Also in place of entries that point to the repository of the Hub that the model came from.
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        package = _find_package()
        with contextlib.nullcontext() if package is None else package.keep_card(self, save_directory):
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            self._add_code_and_card(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any):
        self._add_code_and_card(working_dir)  # the upload is part of save_pretrained, so it does not wait for the end
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _add_code_and_card(self, folder: str | os.PathLike[str]) -> None:
        if not (Path(folder) / "config.json").is_file():  # an adapter, which loads onto another folder
            return
        # The file with the model's classes and those that it imports relatively, also for a class derived elsewhere.
        code = next(cls for cls in type(self).__mro__ if cls.__module__.endswith("modeling_nano_gpt"))
        custom_object_save(code, folder)
        package = _find_package()
        if package is not None:
            package.write_card(self, folder)


def _refuse_checkpoint(source: str | os.PathLike[str] | None, class_name: str) -> None:
    """Raises ValueError for a checkpoint file, or a folder that holds one and no saved model."""
    path = Path(source or "")
    is_folder = path.is_dir() and (path / "ckpt.pt").is_file() and not (path / "config.json").is_file()
    if source is not None and (is_folder or path.is_file() or path.suffix in (".ckpt", ".pt", ".pth")):
        raise ValueError(
            f"{path}: expected a folder that save_pretrained wrote, or a hub id, got a checkpoint; load it with "
            f"{class_name}.from_nanogpt_ckpt, or make a folder of it with `hugging-nano-gpt convert`"
        )


class NanoGPTWayBackMixin:
    """Writing a checkpoint: what a model with a language-model head adds."""

    def to_nanogpt_ckpt(self, ckpt_path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes a checkpoint that nanoGPT's train.py resumes and its sample.py reads.

        Every tensor is written bit for bit, under nanoGPT's names. The file appears under its name only when it is
        complete; a file that was there before stays whole until then.

        Args:
            ckpt_path: Path of the ckpt.pt to write. Missing folders are made, as nanoGPT makes its out_dir.
            **kwargs: `optimizer`, `iter_num`, `best_val_loss` and `config` of the checkpoint. The last three default
                to those of the checkpoint the model came from, or else to nanoGPT's values before the first step;
                `optimizer` is a checkpoint's `training_state.optimizer`, what training.read_optimizer takes from an
                AdamW, or an AdamW state dict in nanoGPT's parameter order; a fresh one by default. Under
                torch.distributed every process calls this, for sharded tensors, and the first one writes.

        Raises:
            ConversionError: If the model computes something that nanoGPT cannot (an untied head, a wrapped or
                quantised layer), or the optimizer state does not fit the model.
            CheckpointError: If the file cannot be written.
            ImportError: If the model runs as remote code where hugging-nano-gpt is not installed.
        """
        _require_package().save_model(self, ckpt_path, **kwargs)


def _find_package():
    """Imports what reads and writes checkpoints and cards; returns None where hugging-nano-gpt is not installed."""
    try:  # by name, because remote code may not import a package that its users need not have
        return importlib.import_module("hugging_nano_gpt.convert")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "hugging_nano_gpt":
            raise  # installed, but something that it needs is not
        return None


def _require_package():
    package = _find_package()
    if package is None:
        raise ImportError(
            "nanoGPT checkpoints are read and written by the package hugging-nano-gpt, which is not installed here; "
            "run: pip install hugging-nano-gpt"
        )
    return package


__all__ = ["AUTO_MAP", "NanoGPTPersistence", "NanoGPTWayBackMixin"]

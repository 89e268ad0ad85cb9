"""How nanoGPT models come from files and go back: checkpoints of nanoGPT, and folders of Transformers.

A saved folder holds the model's code and its card, so it works where hugging-nano-gpt is not installed. What reads and
writes checkpoints is in that package and imported by name when it is asked for. This file travels with saved models as
remote code.
"""

import contextlib
import importlib
import inspect
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .configuration_nano_gpt import write_fields
from .folder_nano_gpt import describe_change, describe_interruption, holds_model, refuse_change, replace_model
from .generation_nano_gpt import document_as

# Where a saved folder has the class for each Auto class; vLLM asks for AutoModel whatever was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_nano_gpt.NanoGPTConfig",
    "AutoModel": "modeling_nano_gpt.NanoGPTModel",
    "AutoModelForCausalLM": "modeling_nano_gpt.NanoGPTLMHeadModel",
    "AutoModelForSequenceClassification": "modeling_nano_gpt.NanoGPTForSequenceClassification",
}

_UPLOAD_FAILED = "Only the upload failed: the files are complete."


class NanoGPTPersistence(PreTrainedModel):
    """Loading from a checkpoint, and saving with the code and a card beside the weights."""

    @classmethod
    @document_as(PreTrainedModel.from_pretrained.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any):
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        advice = describe_checkpoint(Path(pretrained_model_name_or_path), cls.__name__)
        if advice is not None:
            raise ValueError(advice)
        _refuse_incomplete(folder, kwargs.get("config"))
        with refuse_change(folder):
            _refuse_other_config(folder, pretrained_model_name_or_path, kwargs.get("config"))
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
        folder = Path(save_directory)
        arguments = inspect.signature(super().save_pretrained).bind(folder, is_main_process, *args, **kwargs).arguments
        is_shared = arguments.get("distributed_checkpoint", False)  # every process writes into the folder
        failed_upload = None
        if self.should_save_on_this_rank(is_main_process) and holds_model(folder) and not is_shared:
            if arguments.get("push_to_hub"):
                kwargs.setdefault("repo_id", folder.name)  # as Transformers names it
            with replace_model(folder) as new_folder:
                try:
                    self._save_into(new_folder, folder, is_main_process, *args, **kwargs)
                except BaseException as error:
                    if _UPLOAD_FAILED not in getattr(error, "__notes__", ()):
                        raise
                    failed_upload = error  # raised when the files are in place
        else:
            self._save_into(save_directory, folder, is_main_process, *args, **kwargs)
        if hasattr(self, "barrier_after_gathered_checkpoint_save"):  # Transformers waits before the files are in place
            self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))
        if failed_upload is not None:
            raise failed_upload

    def _save_into(self, folder: str | os.PathLike[str], card_folder: str | os.PathLike[str], *args, **kwargs) -> None:
        # Also in place of entries that point to the repository of the Hub that the model came from.
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        package = _find_package()
        with contextlib.nullcontext() if package is None else package.keep_card(self, card_folder):
            super().save_pretrained(folder, *args, **kwargs)
        if self.should_save_on_this_rank(args[0]):
            self._add_code_and_card(folder)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any):
        self._add_code_and_card(working_dir)  # the upload is part of save_pretrained, so it does not wait for the end
        try:
            return super()._upload_modified_files(working_dir, *args, **kwargs)
        except BaseException as error:
            error.add_note(_UPLOAD_FAILED)  # for the user, and for save_pretrained
            raise

    def _add_code_and_card(self, folder: str | os.PathLike[str]) -> None:
        if not (Path(folder) / "config.json").is_file():  # an adapter, which loads onto another folder
            return
        # The file with the model's classes and those that it imports relatively, also for a class derived elsewhere.
        code = next(cls for cls in type(self).__mro__ if cls.__module__.endswith("modeling_nano_gpt"))
        custom_object_save(code, folder)
        package = _find_package()
        if package is not None:
            package.write_card(self, folder)


def describe_checkpoint(path: Path, class_name: str) -> str | None:
    """Says how to load a checkpoint file, or a folder with one and no saved model; None for other paths."""
    is_folder = path.is_dir() and (path / "ckpt.pt").is_file() and not (path / "config.json").is_file()
    if not (is_folder or path.is_file() or path.suffix in (".ckpt", ".pt", ".pth")):
        return None
    return (
        f"{path}: expected a folder that save_pretrained wrote, or a hub id, got a checkpoint; load it with "
        f"{class_name}.from_nanogpt_ckpt, or make a folder of it with `hugging-nano-gpt convert`"
    )


def _refuse_incomplete(folder: Path, config: object) -> None:
    """Raises OSError for a folder that would be loaded in part, or under the default configuration."""
    interruption = describe_interruption(folder)
    if interruption is not None:
        raise OSError(interruption)
    has_config = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if folder.is_dir() and config is None and not has_config:
        raise OSError(
            f"{folder}: expected a folder that save_pretrained wrote, got one without config.json; copy it again from "
            f"where it was written, or give another"
        )


def _refuse_other_config(folder: Path, source: object, config: Any) -> None:
    """Raises OSError if AutoModel has read a config.json that another model has replaced since."""
    as_read = getattr(config, "__dict__", {}).pop("_as_read", None)
    if as_read is None or str(source) != str(config.name_or_path) or not folder.is_dir():
        return
    if as_read != write_fields(PreTrainedConfig.get_config_dict(folder)[0]):
        raise OSError(describe_change(folder))


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
            "nanoGPT checkpoints are read and written by the package hugging-nano-gpt, which is not installed here: "
            "install it from a clone of its repository with `pip install .`, not by its name, which is on no index"
        )
    return package


__all__ = ["AUTO_MAP", "NanoGPTPersistence", "NanoGPTWayBackMixin"]

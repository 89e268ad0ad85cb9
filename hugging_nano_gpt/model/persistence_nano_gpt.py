"""Loads and saves nanoGPT models: folders as Transformers', and checkpoints as nanoGPT's.

A saved folder contains the model's code and a model card, so it can be loaded without hugging-nano-gpt. Checkpoints
are read and written by that package, which is imported only when they are. This file travels with saved models as
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
from .folder_nano_gpt import contains_model, describe_change, describe_interruption, refuse_change, replace_model
from .generation_nano_gpt import document_as

# The class for each Auto class in a saved folder; vLLM uses AutoModel, regardless of the class that was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_nano_gpt.NanoGPTConfig",
    "AutoModel": "modeling_nano_gpt.NanoGPTModel",
    "AutoModelForCausalLM": "modeling_nano_gpt.NanoGPTLMHeadModel",
    "AutoModelForSequenceClassification": "modeling_nano_gpt.NanoGPTForSequenceClassification",
}

_UPLOAD_FAILED = "Only the upload failed: the files are complete."


class NanoGPTPersistence(PreTrainedModel):
    """Loads folders and checkpoints, and saves the code and a model card with the weights."""

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
        """Loads a checkpoint that nanoGPT's train.py wrote; every tensor keeps its bits.

        Nothing in the file is executed, and its optimizer state is not read. The model is in eval mode, as after
        from_pretrained, and does not use the file any more.

        Args:
            ckpt_path: Path of the ckpt.pt.
            **kwargs: `dropout`, `activation_function`, token ids and label settings replace the checkpoint's in the
                configuration; `n_head` is for a file that does not record it, and `ignore_extra=True` for one to which
                a fork has added more. Everything else is passed to from_pretrained (dtype, device_map,
                attn_implementation, quantization_config, ...). The default dtype is the checkpoint's.

        Returns:
            A model of this class. Its `nanogpt_training_state` contains the checkpoint's iter_num, best_val_loss and
            config.

        Raises:
            CheckpointError: If the file is not a complete nanoGPT checkpoint; the message lists every fault.
            ImportError: If the model is remote code and hugging-nano-gpt is not installed.
        """
        return _require_package().load_model(cls, ckpt_path, **kwargs)

    @classmethod
    def from_nanogpt(cls, gpt, **kwargs: Any):
        """Makes a model that shares the tensors of nanoGPT's GPT in memory, so that it follows its training.

        Nothing is copied and no random number is used, so that train.py can call it at any time, for cached generate,
        lm-eval, pipelines or push_to_hub. The model is in eval mode, even if the GPT is not.

        Args:
            gpt: nanoGPT's GPT, which may be compiled or wrapped in DDP.
            **kwargs: Fields of NanoGPTConfig that replace the GPT's, such as `activation_function`.

        Raises:
            ConversionError: If it is not a nanoGPT model, or its code was changed.
            ImportError: See from_nanogpt_ckpt.
        """
        return _require_package().share_model(cls, gpt, **kwargs)

    @property
    def nanogpt_training_state(self):
        """The TrainingState of the nanoGPT run that this model is from; None without hugging-nano-gpt."""
        package = _find_package()
        return None if package is None else package.read_training_state(self.config)

    @document_as(PreTrainedModel.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args, **kwargs):
        folder = Path(save_directory)
        arguments = inspect.signature(super().save_pretrained).bind(folder, is_main_process, *args, **kwargs).arguments
        is_shared = arguments.get("distributed_checkpoint", False)  # every process writes into this folder
        failed_upload = None
        if self._saves_here(is_main_process) and contains_model(folder) and not is_shared:
            if arguments.get("push_to_hub"):
                kwargs.setdefault("repo_id", folder.name)  # Transformers' default, but not for the temporary folder
            with replace_model(folder) as new_folder:
                try:
                    self._save_into(new_folder, folder, is_main_process, *args, **kwargs)
                except BaseException as error:
                    if _UPLOAD_FAILED not in getattr(error, "__notes__", ()):
                        raise
                    failed_upload = error  # raised below, when the files are in the folder
        else:
            self._save_into(save_directory, folder, is_main_process, *args, **kwargs)
        if hasattr(self, "barrier_after_gathered_checkpoint_save"):  # Transformers has waited for the temporary folder
            self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))
        if failed_upload is not None:
            raise failed_upload

    def _saves_here(self, is_main_process: bool) -> bool:
        """Returns whether this process writes files; before Transformers 5.15 only the caller decides that."""
        return getattr(self, "should_save_on_this_rank", bool)(is_main_process)

    def _save_into(self, folder: str | os.PathLike[str], card_folder: str | os.PathLike[str], *args, **kwargs) -> None:
        # also replaces entries that point to the repository on the Hub that the model was loaded from
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        package = _find_package()
        with contextlib.nullcontext() if package is None else package.keep_card(self, card_folder):
            super().save_pretrained(folder, *args, **kwargs)
        if self._saves_here(args[0]):
            self._add_code_and_card(folder)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any):
        self._add_code_and_card(working_dir)  # save_pretrained uploads before it returns to _save_into
        try:
            return super()._upload_modified_files(working_dir, *args, **kwargs)
        except BaseException as error:
            error.add_note(_UPLOAD_FAILED)  # for the user, and for our save_pretrained
            raise

    def _add_code_and_card(self, folder: str | os.PathLike[str]) -> None:
        if not (Path(folder) / "config.json").is_file():  # an adapter, which is loaded with another folder
            return
        # the modeling file and the files that it imports, even if this class is derived from one of ours
        code = next(cls for cls in type(self).__mro__ if cls.__module__.endswith("modeling_nano_gpt"))
        custom_object_save(code, folder)
        package = _find_package()
        if package is not None:
            package.write_card(self, folder)


def describe_checkpoint(path: Path, class_name: str) -> str | None:
    """Returns how to load a checkpoint, or a folder that contains one and no saved model; None for other paths."""
    is_folder = path.is_dir() and (path / "ckpt.pt").is_file() and not (path / "config.json").is_file()
    if not (is_folder or path.is_file() or path.suffix in (".ckpt", ".pt", ".pth")):
        return None
    return (
        f"{path}: expected a folder that save_pretrained wrote, or a hub id, got a checkpoint; load it with "
        f"{class_name}.from_nanogpt_ckpt, or make a folder of it with `hugging-nano-gpt convert`"
    )


def _refuse_incomplete(folder: Path, config: object) -> None:
    """Raises OSError for a folder that has no whole model, or would be loaded with the default configuration."""
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
    """Raises OSError if another model has replaced the config.json that AutoModel has read."""
    as_read = getattr(config, "__dict__", {}).pop("_as_read", None)
    if as_read is None or str(source) != str(config.name_or_path) or not folder.is_dir():
        return
    if as_read != write_fields(PreTrainedConfig.get_config_dict(folder)[0]):
        raise OSError(describe_change(folder))


class NanoGPTCheckpointMixin:
    """Writes checkpoints, for models with a language-model head."""

    def to_nanogpt_ckpt(self, ckpt_path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes a checkpoint that nanoGPT's train.py resumes and its sample.py reads; every tensor keeps its bits.

        An existing file is replaced only when the new one is complete. Under torch.distributed every process has to
        call this, because tensors may be sharded; the first one writes.

        Args:
            ckpt_path: Path of the ckpt.pt. Missing folders are made, as nanoGPT makes its out_dir.
            **kwargs: `iter_num`, `best_val_loss` and `config` of the checkpoint default to those of the checkpoint
                that the model is from, or else to nanoGPT's values before the first step. `optimizer` is the
                `training_state.optimizer` of a checkpoint, what training.read_optimizer returns for an AdamW, or an
                AdamW state dict in nanoGPT's parameter order; a fresh one by default. `overwrite` says whether an
                existing file may be replaced; without it, it is, with a FutureWarning.

        Raises:
            ConversionError: If nanoGPT cannot compute the same (an untied head, a wrapped or quantised layer), the
                optimizer state does not fit the model, or the file exists and `overwrite` is False.
            CheckpointError: If the file cannot be written.
            ImportError: See from_nanogpt_ckpt.
        """
        _require_package().save_model(self, ckpt_path, **kwargs)


def _find_package():
    """Imports what reads and writes checkpoints and cards; returns None if hugging-nano-gpt is not installed."""
    try:  # by name, because Transformers refuses remote code that imports a package that is not installed
        return importlib.import_module("hugging_nano_gpt.convert")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "hugging_nano_gpt":
            raise  # the package is installed, but not what it imports
        return None


def _require_package():
    package = _find_package()
    if package is None:
        raise ImportError(
            "nanoGPT checkpoints are read and written by the package hugging-nano-gpt, which is not installed here: "
            "install it from a clone of its repository with `pip install .`, not by its name, which is on no index"
        )
    return package

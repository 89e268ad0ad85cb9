"""nanoGPT's own ckpt.pt: every era read, and written as train.py @ 3adf61e resumes from it.

A dict of model, optimizer, model_args, iter_num, best_val_loss and config. Only model must be there: the first version
had no more than four of them, people strip files to make them smaller, and torch.distributed.checkpoint is often given
only model and optimizer. What a file does not record is found in its tensors (model_args, but for n_head and dropout)
or follows from its age (the GELU).
"""

import reprlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from ..errors import join_some, list_some
from ..pickles import find_foreign
from .check import find_key_faults, find_model_faults, is_tied
from .contents import NO_VAL_LOSS, Checkpoint, TrainingState
from .distributed import number_parameters, rename_optimizer
from .optimizer import OptimizerState, from_adamw, group_by_module, make_fresh_state
from .tensors import MODEL_ARGS, CleanNames, clean_names, infer_model_args, tie_missing_head
from .torch_file import IGNORE_ADVICE, TorchFile

NAME = "nanogpt"

_REQUIRED_KEYS = ("model", "model_args")
_KEYS = ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")

# Every setting that a train.py of nanoGPT has had, fe804286 to 3adf61e, and vocab_size.
_SETTINGS = frozenset(
    "out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log wandb_entity "
    "wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size vocab_size n_layer n_head "
    "n_embd dropout bias learning_rate max_iters weight_decay betas beta1 beta2 grad_clip decay_lr warmup_iters "
    "lr_decay_iters min_lr backend device dtype compile compile_model".split()
)


def recognise(contents: Any) -> bool:
    """Tells whether an unpickled file is meant to be a nanoGPT checkpoint."""
    return isinstance(contents, dict) and any(key in contents for key in _REQUIRED_KEYS)


def read(file: TorchFile, *, n_head: int | None, with_optimizer: bool, ignore_extra: bool) -> Checkpoint:
    """Reads a nanoGPT checkpoint, after checking every key, shape and dtype in it.

    Raises:
        CheckpointError: With all faults found, before any tensor is read; or if the optimizer is wanted and its
            moments cannot be named with certainty.
    """
    contents = rename_optimizer(file.contents)
    contents, assumptions = _leave_out_extra(contents) if ignore_extra else (contents, [])
    faults = find_key_faults("checkpoint", contents, ("model",), _KEYS) + _find_type_faults(contents, with_optimizer)
    if not isinstance(contents.get("model"), dict) or not isinstance(contents.get("model_args", {}), dict):
        raise _fail(file, faults)
    file.refuse_foreign([contents["model"], contents.get("model_args")])
    names = clean_names(contents["model"])
    recorded = contents.get("model_args")
    if recorded is None and n_head is None:
        raise _fail(file, [*faults, "checkpoint: missing 'model_args', or n_head= (--n-head) instead"])
    if recorded is None:
        recorded = {**infer_model_args(names.tensors), "n_head": n_head, "dropout": 0.0}
        assumptions.append("dropout 0.0, and sizes as its tensors have: there are no model_args")
    if "vocab_size" in recorded:  # before that was recorded, lm_head was not tied
        assumptions += tie_missing_head(names.tensors)
    model_args, inferred = _complete_model_args(recorded, names.tensors)
    faults += names.faults + find_model_faults(model_args, names.tensors)
    if faults:
        raise _fail(file, faults)

    state_dict = file.read_tensors(names.tensors)
    tied = is_tied(state_dict)
    optimizer = _name_moments(file, contents.get("optimizer"), model_args, tied, with_optimizer)
    era, activation_function, reason = _tell_age(recorded, names, optimizer)
    return Checkpoint(
        model_args=model_args,
        state_dict=state_dict,
        tie_word_embeddings=tied,
        training_state=_read_training_state(file, contents, optimizer if with_optimizer else None),
        activation_function=activation_function,
        format=NAME,
        era=era,
        has_optimizer=contents.get("optimizer") is not None,
        assumptions=(*assumptions, *inferred, reason, *_describe_unknown_settings(contents.get("config", {}))),
    )


def write(checkpoint: Checkpoint, file: BinaryIO) -> None:
    """Writes a checkpoint of today's format; the caller has checked it."""
    state = checkpoint.training_state
    optimizer = make_fresh_state(state.config) if state.optimizer is None else state.optimizer
    torch.save(
        {
            "model": OrderedDict(checkpoint.state_dict),
            "optimizer": optimizer.to_adamw(checkpoint.model_args),
            "model_args": {name: checkpoint.model_args[name] for name in MODEL_ARGS},
            "iter_num": state.iter_num,
            "best_val_loss": state.best_val_loss,
            "config": state.config,
        },
        file,
    )


def _fail(file: TorchFile, faults: list[str]) -> Exception:
    kept = {key: value for key, value in file.contents.items() if key not in _REQUIRED_KEYS}
    extra = {*find_key_faults("checkpoint", kept, (), _KEYS), *_find_type_faults(kept, with_optimizer=True)}
    advice = f"give a checkpoint as nanoGPT's train.py wrote it{IGNORE_ADVICE if extra >= set(faults) else ''}"
    return file.fail(f"not a whole nanoGPT checkpoint: {'; '.join(faults)}", advice)


def _leave_out_extra(contents: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keeps of a fork's checkpoint what is nanoGPT's, and says what it has left out."""
    kept = {
        key: value
        for key, value in contents.items()
        if key in _REQUIRED_KEYS
        or (key in _KEYS and not _find_type_faults({key: value}, with_optimizer=True) and not find_foreign(value))
    }
    extra = [key for key in contents if key not in kept]
    return kept, [f"{list_some(extra)} left out of account, as asked"] if extra else []


def _find_type_faults(contents: Mapping[str, Any], with_optimizer: bool) -> list[str]:
    expected_types = {"model": dict, "model_args": dict, "optimizer": dict, "config": dict, "iter_num": int}
    if not with_optimizer or contents.get("optimizer", {}) is None:  # as some strip it from a file
        del expected_types["optimizer"]
    faults = [
        f"{key}: expected {expected.__name__}, got {type(contents[key]).__name__}"
        for key, expected in expected_types.items()
        if key in contents and not isinstance(contents[key], expected)
    ]
    if not _is_real_number(contents.get("best_val_loss", NO_VAL_LOSS)):
        faults.append(f"best_val_loss: expected a number, got {type(contents['best_val_loss']).__name__}")
    return faults


def _name_moments(
    file: TorchFile, adamw: Any, model_args: Mapping[str, Any], tied: bool, is_wanted: bool
) -> OptimizerState | None:
    """Returns the optimizer's state by name; None if there is none, or one of another form that is not wanted."""
    if adamw is None:
        return None
    try:
        return from_adamw(number_parameters(adamw, model_args, tied), model_args, tied)
    except ValueError as error:
        if not is_wanted:
            return None
        raise file.fail(
            f"its optimizer state cannot be named with certainty: {error}",
            "read the checkpoint with with_optimizer=False to use the model alone",
        ) from error


def _is_real_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    try:
        return isinstance(value, int | float) and isinstance(float(value), float)
    except OverflowError:
        return False


def _complete_model_args(
    recorded: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """Adds vocab_size (recorded since 2023-01-14) and bias (since 2023-01-27) where the file lacks them."""
    inferred = {name: value for name, value in infer_model_args(tensors).items() if name in ("vocab_size", "bias")}
    missing = {name: value for name, value in inferred.items() if name not in recorded}
    assumptions = [f"{name} {value}, as its tensors have: model_args lacks it" for name, value in missing.items()]
    return {**recorded, **missing}, assumptions


def _tell_age(
    recorded: Mapping[str, Any], names: CleanNames, optimizer: OptimizerState | None
) -> tuple[str, str, str]:
    """Returns the era, its GELU (exact since f08abb45, 2023-06-14; the tanh formula before), and the sign of it."""
    tanh = "tanh GELU, as nanoGPT computed when"
    if "bias" not in recorded:
        return "before 2023-01-27", "gelu_new", f"{tanh} model_args had no bias (before 2023-01-27)"
    if optimizer is not None and optimizer.grouping is group_by_module:
        return "before 2023-05-06", "gelu_new", f"{tanh} its optimizer grouped so (before 2023-05-06)"
    if optimizer is None and names.has_masks:
        return "before 2023-01-30", "gelu_new", f"{tanh} it stored attention masks (before 2023-01-30)"
    since = "2023-01-27" if optimizer is None else "2023-05-06"
    return f"since {since}", "gelu", "exact GELU, as nanoGPT computes since 2023-06-14: the file does not record it"


def _describe_unknown_settings(config: Mapping[Any, Any]) -> list[str]:
    """Says, in a sentence, which settings of a fork are on: they may change the model, and no tensor would tell."""
    unknown = [
        f"{name}={reprlib.repr(value)}"
        for name, value in config.items()
        if name not in _SETTINGS and value is not None and value is not False
    ]
    if not unknown:
        return []
    return [
        f"nanoGPT's own model, though config has settings that nanoGPT's train.py does not have: "
        f"{join_some(unknown)}; if they change the model, its numbers will differ"
    ]


def _read_training_state(
    file: TorchFile, contents: Mapping[str, Any], optimizer: OptimizerState | None
) -> TrainingState:
    if optimizer is not None:
        optimizer = OptimizerState(optimizer.settings, file.read_tree(optimizer.moments), optimizer.grouping)
    return TrainingState(
        iter_num=contents.get("iter_num", 0),
        best_val_loss=float(file.read_tree(contents.get("best_val_loss", NO_VAL_LOSS))),
        config=file.read_tree(contents.get("config", {})),
        optimizer=optimizer,
    )

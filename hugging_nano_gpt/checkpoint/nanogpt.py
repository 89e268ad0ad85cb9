"""nanoGPT's own ckpt.pt: every era is read, and written as train.py @ 3adf61e resumes from it.

A dict of model, optimizer, model_args, iter_num, best_val_loss and config. Only model is required: the first version
had no more than four of the keys, people strip files to make them smaller, and torch.distributed.checkpoint is often
given only model and optimizer. What a file does not record is inferred from its tensors (model_args, except n_head and
dropout) or from its age (the GELU).
"""

import reprlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import torch

from ..errors import join_some, list_some
from ..files.pickles import find_foreign
from .contents import NO_VAL_LOSS, Checkpoint, ReadingOptions, TrainingState
from .faults import find_key_faults
from .file import CheckpointFile
from .layout import MODEL_ARGS
from .moments import OptimizerState, from_adamw, group_by_module, make_fresh_state, number_parameters
from .state_dict import StateDict

NAME, KIND = "nanogpt", "nanoGPT checkpoint"

_REQUIRED_KEYS = ("model", "model_args")
_KEYS = ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")
_TYPES = {"model": dict, "model_args": dict, "optimizer": dict, "config": dict, "iter_num": int}

# Every setting that a train.py of nanoGPT has had, fe804286 to 3adf61e, and vocab_size.
_SETTINGS = frozenset(
    "out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log wandb_entity "
    "wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size vocab_size n_layer n_head "
    "n_embd dropout bias learning_rate max_iters weight_decay betas beta1 beta2 grad_clip decay_lr warmup_iters "
    "lr_decay_iters min_lr backend device dtype compile compile_model".split()
)


def recognise(file: CheckpointFile) -> bool:
    """Returns whether a file is meant to be a nanoGPT checkpoint."""
    return isinstance(file.contents, dict) and any(key in file.contents for key in _REQUIRED_KEYS)


def read(file: CheckpointFile, options: ReadingOptions) -> Checkpoint:
    """Reads a nanoGPT checkpoint; see StateDict.read.

    Raises:
        CheckpointError: With all faults, before any tensor is read; or if the optimizer is wanted and its moments
            cannot be named with certainty.
    """
    contents, assumptions = _select_parts(file.contents, options.ignore_extra)
    optional = {key: value for key, value in contents.items() if key not in _REQUIRED_KEYS}
    extra = find_key_faults("checkpoint", optional, (), _KEYS) + _find_type_faults(optional, options.with_optimizer)
    faults = find_key_faults("checkpoint", contents, ("model",), _KEYS)
    faults += _find_type_faults(contents, options.with_optimizer)
    model, recorded = contents.get("model"), contents.get("model_args")
    whole = (KIND, "give a checkpoint as nanoGPT's train.py wrote it")
    found = StateDict(file, model, whole, faults, extra)
    if not isinstance(model, dict) or not isinstance(contents.get("model_args", {}), dict):
        raise found.fail()
    file.refuse_foreign([model, recorded])
    if recorded is None and options.n_head is None:
        found.faults.append("checkpoint: missing 'model_args', or n_head= (--n-head) instead")
        raise found.fail()
    if recorded is None:
        recorded = {**found.infer_model_args(), "n_head": options.n_head, "dropout": 0.0}
        assumptions.append("dropout 0.0, and sizes as its tensors have: there are no model_args")
    if "vocab_size" in recorded:  # before vocab_size was recorded, lm_head was not tied
        found.tie_missing_head()
    inferred = found.infer_model_args()  # vocab_size is recorded since 2023-01-14, bias since 2023-01-27
    missing = [name for name in ("vocab_size", "bias") if name in inferred and name not in recorded]
    checkpoint = found.read({**recorded, **{name: inferred[name] for name in missing}})
    optimizer = _name_moments(file, contents.get("optimizer"), checkpoint, options.with_optimizer)
    era, activation_function, reason = _find_age(recorded, found.has_masks, optimizer)
    return replace(
        checkpoint,
        training_state=_read_training_state(file, contents, optimizer if options.with_optimizer else None),
        activation_function=activation_function,
        era=era,
        has_optimizer=contents.get("optimizer") is not None,
        assumptions=(
            *assumptions,
            *checkpoint.assumptions,
            *(f"{name} {inferred[name]}, as its tensors have: model_args lacks it" for name in missing),
            reason,
            *_describe_unknown_settings(contents.get("config", {})),
        ),
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


def _select_parts(contents: Mapping[str, Any], ignore_extra: bool) -> tuple[dict[str, Any], list[str]]:
    """Returns the parts of a file under nanoGPT's keys, without a fork's if they are to be ignored; and says so."""
    if "optimizer" not in contents:  # what get_state_dict of torch.distributed.checkpoint gives is saved as "optim"
        contents = {"optimizer" if key == "optim" else key: value for key, value in contents.items()}
    kept = {
        key: value
        for key, value in contents.items()
        if not ignore_extra
        or key in _REQUIRED_KEYS
        or (key in _KEYS and not _find_type_faults({key: value}, with_optimizer=True) and not find_foreign(value))
    }
    extra = [key for key in contents if key not in kept]
    return kept, [f"{list_some(extra)} ignored, as asked"] if extra else []


def _find_type_faults(contents: Mapping[str, Any], with_optimizer: bool) -> list[str]:
    """Finds parts of the wrong type; an optimizer of any type passes where it is not wanted, or is None."""
    faults = [
        f"{key}: expected {expected.__name__}, got {type(contents[key]).__name__}"
        for key, expected in _TYPES.items()
        if key in contents and not isinstance(contents[key], expected)
        if key != "optimizer" or (with_optimizer and contents[key] is not None)
    ]
    if not _is_real_number(contents.get("best_val_loss", NO_VAL_LOSS)):
        faults.append(f"best_val_loss: expected a number, got {type(contents['best_val_loss']).__name__}")
    return faults


def _is_real_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    try:
        return isinstance(value, int | float) and isinstance(float(value), float)
    except OverflowError:
        return False


def _name_moments(file: CheckpointFile, adamw: Any, checkpoint: Checkpoint, is_wanted: bool) -> OptimizerState | None:
    """Returns the optimizer's state by name; None if the file has none, or one of another form that is not wanted."""
    if adamw is None:
        return None
    model_args, is_tied = checkpoint.model_args, checkpoint.tie_word_embeddings
    try:
        return from_adamw(number_parameters(adamw, model_args, is_tied), model_args, is_tied)
    except ValueError as error:
        if not is_wanted:
            return None
        raise file.fail(
            f"its optimizer state cannot be named with certainty: {error}",
            "read the checkpoint with with_optimizer=False to use the model alone",
        ) from error


def _find_age(recorded: Mapping[str, Any], has_masks: bool, optimizer: OptimizerState | None) -> tuple[str, str, str]:
    """Returns the era, its GELU (exact since f08abb45, 2023-06-14; the tanh formula before), and the sign of it."""
    tanh = "tanh GELU, as nanoGPT computed when"
    if "bias" not in recorded:
        return "before 2023-01-27", "gelu_new", f"{tanh} model_args had no bias (before 2023-01-27)"
    if optimizer is not None and optimizer.grouping is group_by_module:
        return "before 2023-05-06", "gelu_new", f"{tanh} its optimizer grouped so (before 2023-05-06)"
    if optimizer is None and has_masks:
        return "before 2023-01-30", "gelu_new", f"{tanh} it stored attention masks (before 2023-01-30)"
    since = "2023-01-27" if optimizer is None else "2023-05-06"
    return f"since {since}", "gelu", "exact GELU, as nanoGPT computes since 2023-06-14: the file does not record it"


def _describe_unknown_settings(config: Mapping[Any, Any]) -> list[str]:
    """Returns a sentence with a fork's settings that are on: they may change the model without a trace in a tensor."""
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
    file: CheckpointFile, contents: Mapping[str, Any], optimizer: OptimizerState | None
) -> TrainingState:
    return TrainingState(
        iter_num=contents.get("iter_num", 0),
        best_val_loss=float(file.read_tree(contents.get("best_val_loss", NO_VAL_LOSS))),
        config=file.read_tree(contents.get("config", {})),
        optimizer=optimizer and replace(optimizer, moments=file.read_tree(optimizer.moments)),
    )

"""build-nanogpt's model_NNNNN.pt (karpathy/build-nanogpt train_gpt2.py): read only.

A dict of model, config, step and val_loss. The config is a pickled GPTConfig of the script's `__main__`; that one name
is admitted, and stands for the empty class below. Always with biases and tied, without dropout, and with torch's tanh
GELU; no optimizer is saved.
"""

from typing import Any

from .check import find_key_faults, find_model_faults, is_tied
from .contents import NO_VAL_LOSS, Checkpoint, TrainingState
from .tensors import clean_names, tie_missing_head
from .torch_file import IGNORE_ADVICE, TorchFile

NAME = "build_nanogpt"
ACTIVATION_FUNCTION = "gelu_pytorch_tanh"

_KEYS = ("model", "config", "step", "val_loss")
_CONFIG_FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


class GPTConfig:
    """Stands in for build-nanogpt's dataclass while its file is read: it takes the fields and does nothing."""


ADMITTED = {"__main__.GPTConfig": GPTConfig}


def recognise(contents: Any) -> bool:
    """Tells whether an unpickled file is meant to be a build-nanogpt checkpoint."""
    return isinstance(contents, dict) and "model" in contents and isinstance(contents.get("config"), GPTConfig)


def read(file: TorchFile, *, ignore_extra: bool) -> Checkpoint:
    """Reads a build-nanogpt checkpoint, after checking every key, shape and dtype in it.

    Raises:
        CheckpointError: With all faults found, before any tensor is read.
    """
    contents = {key: value for key, value in file.contents.items() if key in _KEYS or not ignore_extra}
    file.refuse_foreign(contents)
    fields = vars(contents["config"])
    faults = find_key_faults("checkpoint", contents, ("model", "config"), _KEYS)
    faults += find_key_faults("config", fields, _CONFIG_FIELDS, _CONFIG_FIELDS)
    faults += [
        f"{key}: expected a number, got {type(contents[key]).__name__}"
        for key in ("step", "val_loss")
        if not isinstance(contents.get(key, 0), int | float)
    ]
    model_args = {**fields, "bias": True, "dropout": 0.0}
    names = clean_names(contents["model"] if isinstance(contents["model"], dict) else {})
    assumptions = tie_missing_head(names.tensors)
    faults += names.faults + find_model_faults(model_args, names.tensors)
    if faults:
        extra = set(find_key_faults("checkpoint", contents, (), _KEYS))
        raise file.fail(
            f"not a whole build-nanogpt checkpoint: {'; '.join(faults)}",
            f"give one as its script wrote it{IGNORE_ADVICE if extra >= set(faults) else ''}",
        )
    state = TrainingState(contents.get("step", 0), float(contents.get("val_loss", NO_VAL_LOSS)))
    state_dict = file.read_tensors(names.tensors)
    return Checkpoint(
        model_args=model_args,
        state_dict=state_dict,
        tie_word_embeddings=is_tied(state_dict),
        training_state=state,
        activation_function=ACTIVATION_FUNCTION,
        format=NAME,
        assumptions=(*assumptions, "tanh GELU as torch computes it, as in build-nanogpt: the file does not record it"),
    )

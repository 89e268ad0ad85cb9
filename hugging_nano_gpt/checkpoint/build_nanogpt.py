"""build-nanogpt's model_NNNNN.pt (karpathy/build-nanogpt train_gpt2.py): read only.

A dict of model, config, step and val_loss. The config is a pickled GPTConfig of the script's `__main__`; only that
name is admitted, and the empty class below is made for it. The model always has biases and a tied head, no dropout,
and torch's tanh GELU; no optimizer is saved.
"""

from dataclasses import replace

from .contents import NO_VAL_LOSS, Checkpoint, ReadingOptions, TrainingState
from .faults import find_key_faults
from .file import CheckpointFile
from .state_dict import StateDict

NAME, KIND = "build_nanogpt", "build-nanogpt checkpoint"

_KEYS = ("model", "config", "step", "val_loss")
_CONFIG_FIELDS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


class GPTConfig:
    """Made for build-nanogpt's dataclass while its file is read: it takes the fields and does nothing."""


ADMITTED = {"__main__.GPTConfig": GPTConfig}


def recognise(file: CheckpointFile) -> bool:
    """Returns whether a file is meant to be a build-nanogpt checkpoint."""
    contents = file.contents
    return isinstance(contents, dict) and "model" in contents and isinstance(contents.get("config"), GPTConfig)


def read(file: CheckpointFile, options: ReadingOptions) -> Checkpoint:
    """Reads a build-nanogpt checkpoint; see StateDict.read.

    Raises:
        CheckpointError: With all faults, before any tensor is read.
    """
    contents = {key: value for key, value in file.contents.items() if key in _KEYS or not options.ignore_extra}
    file.refuse_foreign(contents)
    fields = vars(contents["config"])
    extra = find_key_faults("checkpoint", contents, (), _KEYS)
    faults = extra + find_key_faults("config", fields, _CONFIG_FIELDS, _CONFIG_FIELDS)
    faults += [
        f"{key}: expected a number, got {type(contents[key]).__name__}"
        for key in ("step", "val_loss")
        if not isinstance(contents.get(key, 0), int | float)
    ]
    found = StateDict(file, contents["model"], (KIND, "give one as its script wrote it"), faults, extra)
    found.tie_missing_head()
    checkpoint = found.read({**fields, "bias": True, "dropout": 0.0})
    return replace(
        checkpoint,
        training_state=TrainingState(contents.get("step", 0), float(contents.get("val_loss", NO_VAL_LOSS))),
        activation_function="gelu_pytorch_tanh",
        assumptions=(
            *checkpoint.assumptions,
            "tanh GELU as torch computes it, as in build-nanogpt: the file does not record it",
        ),
    )

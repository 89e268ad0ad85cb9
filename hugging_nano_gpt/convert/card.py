"""Model cards: the README.md of a saved folder, written from what the model knows of itself.

Everything in a card is read off the configuration, so it is true of every model of the family and costs nothing to
write. It claims no license: only the user knows that. A README.md that is there is the user's and is left alone.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from ..files import open_atomically
from ..model.configuration_nano_gpt import GPT2_TOKENS, GPT2_VOCAB_SIZES
from .facts import CLASSIFIER, LANGUAGE_MODEL, describe_model, describe_training
from .nanogpt import read_training_state

_FILE_NAME = "README.md"

# What Transformers uploads as README.md where there is none yet (utils/hub.py, create_and_tag_model_card).
_TEMPLATE_SIGN = b"This model card has been automatically generated."


class _Kind(NamedTuple):
    title: str
    auto_class: str
    pipeline_tag: str


_KINDS = {
    "NanoGPTModel": _Kind("transformer without a head", "AutoModel", "feature-extraction"),
    LANGUAGE_MODEL: _Kind("language model", "AutoModelForCausalLM", "text-generation"),
    CLASSIFIER: _Kind("sequence classifier", "AutoModelForSequenceClassification", "text-classification"),
}

# train.py's settings that decide what is learned, in its order (train.py @ 3adf61e). The shape is in another table.
_SETTINGS = """
init_from dataset gradient_accumulation_steps batch_size block_size dropout learning_rate max_iters weight_decay beta1
beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr dtype
""".split()

# Below this a vocabulary is taken to be one of characters or bytes.
_MANY_TOKENS = 1000


def write_card(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Writes a model card into a folder, unless it has a README.md of its own.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    path = Path(folder) / _FILE_NAME
    template = _read_bytes(path)
    if template is not None and _TEMPLATE_SIGN not in template:
        return
    card = getattr(model, "_own_card", None)  # what keep_card found before Transformers wrote its template over it
    if card is None:
        metadata: Any = None if template is None else ModelCard(template.decode()).data
        card = make_card(model, tags=getattr(metadata, "tags", None) or ()).encode()
    _write_bytes(path, card)


@contextlib.contextmanager
def keep_card(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps the README.md of a folder as it is while Transformers saves and pushes, which would replace it."""
    path = Path(folder) / _FILE_NAME
    own_card = _read_bytes(path)
    model._own_card = own_card
    try:
        yield
    finally:
        del model._own_card
        if own_card is not None and _read_bytes(path) != own_card:
            _write_bytes(path, own_card)


def make_card(model: PreTrainedModel, tags: Sequence[str] = ()) -> str:
    """Returns the text of a model card: a block of metadata, then Markdown.

    Args:
        model: A model of this package, or the same as remote code.
        tags: Tags for the metadata besides `nanogpt`.
    """
    class_name = next(cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _KINDS)
    kind, config = _KINDS[class_name], model.config
    sections = [
        f"# nanoGPT {kind.title}",
        "A model of [nanoGPT](https://github.com/karpathy/nanoGPT)'s architecture as a Transformers model, with "
        "nanoGPT's tensors under nanoGPT's names.",
        "## Architecture",
        _make_table({**describe_model(config, class_name), "dtype": str(model.dtype).removeprefix("torch.")}),
        *_describe_training(config),
        "## Loading",
        *_describe_loading(config, class_name),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _list_limits(model, class_name)),
        "## License",
        "None is stated here. If you publish the model, choose one and name it in the block at the top of this file, "
        "as in `license: mit`; the license of the training data may have a say in it.",
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=kind.pipeline_tag,
        tags=["nanogpt", *(tag for tag in tags if tag != "nanogpt")],
    )
    return "\n\n".join([f"---\n{data}\n---", *sections]) + "\n"


def _describe_training(config: PreTrainedConfig) -> list[str]:
    state = read_training_state(config)
    if state.iter_num == 0 and not state.config:
        return []
    settings = {f"`{name}`": state.config[name] for name in _SETTINGS if name in state.config}
    return [
        "## Training",
        "Where the run stood that wrote the nanoGPT checkpoint of this model, and its settings. The loss is in nats "
        "per token. Training since then, if there was any, is not recorded here.",
        _make_table({**describe_training(state), **settings}),
    ]


def _describe_loading(config: PreTrainedConfig, class_name: str) -> list[str]:
    auto_class = _KINDS[class_name].auto_class
    back = ""
    if class_name == LANGUAGE_MODEL and config.tie_word_embeddings:
        back = '\nmodel.to_nanogpt_ckpt("ckpt.pt")  # what nanoGPT\'s train.py resumes and its sample.py reads'
    return [
        "With Transformers alone, running the Python files beside this one (`trust_remote_code`), which import "
        "nothing but torch and transformers:",
        f"```python\nfrom transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("path/or/name", trust_remote_code=True)\n```',
        "With the package hugging-nano-gpt, which brings the same code and the way back to nanoGPT (install it from a "
        "clone of its repository: it is on no package index):",
        f"```python\nfrom hugging_nano_gpt import {class_name}\n\n"
        f'model = {class_name}.from_pretrained("path/or/name"){back}\n```',
    ]


def _list_limits(model: PreTrainedModel, class_name: str) -> list[str]:
    config, is_language_model = model.config, class_name == LANGUAGE_MODEL
    limits = [f"It reads at most {config.block_size:,} tokens at once."]
    if is_language_model:
        limits[0] += " `generate` goes on past that with the last of them, as nanoGPT does."
    vocabulary = "Only the tokenizer of the training data fits the token ids."
    end = model.generation_config.eos_token_id if is_language_model else None
    if config.vocab_size in GPT2_VOCAB_SIZES and end in (None, GPT2_TOKENS - 1):
        vocabulary += f" {config.vocab_size:,} rows are taken for GPT-2's {GPT2_TOKENS:,} tokens and what was added."
    elif config.vocab_size < _MANY_TOKENS:
        vocabulary += (
            f" A vocabulary of {config.vocab_size:,} is the size of an alphabet: text with a character from outside "
            f"of it cannot be encoded."
        )
    limits.append(vocabulary)
    n_suppressed = len(model.generation_config.suppress_tokens or ()) if is_language_model else 0
    if n_suppressed:
        limits.append(f"{n_suppressed:,} ids of the vocabulary stand for nothing; `generate` never chooses them.")
    if is_language_model:
        limits.append(
            "nanoGPT trains base models. Unless it was tuned since, the model continues text, follows no "
            "instructions, and was taught neither to be right nor to be harmless."
        )
    if class_name == CLASSIFIER:
        limits.append("nanoGPT trains no classifiers: the scores mean what training in Transformers has made of them.")
    if is_language_model and not config.tie_word_embeddings:
        limits.append("It cannot go back to nanoGPT, which ties the output layer to the token embedding.")
    elif is_language_model and config.activation_function != "gelu":
        limits.append("Back in today's nanoGPT its numbers differ slightly, as that computes the exact GELU.")
    return limits


def _make_table(rows: Mapping[str, Any]) -> str:
    # Settings come from a file: nothing in them may end the cell or the line.
    cells = {name: re.sub(r"[\s|`<>\[\]]+", " ", str(value))[:100] for name, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell} |" for name, cell in cells.items())])


def _read_bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write_bytes(path: Path, contents: bytes) -> None:
    with open_atomically(path) as file:
        file.write(contents)

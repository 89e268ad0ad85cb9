"""Model cards: the README.md of a saved folder, written from the model's configuration.

A card says what the model is, how to load it and generate with it, how it was trained, and its limits. It claims no
license, because only the user knows that. A README.md that already exists is the user's and is not touched.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from ..files.files import open_atomically
from ..model.configuration_nano_gpt import GPT2_TOKENS, GPT2_VOCAB_SIZES, OLDEST_TRANSFORMERS
from .facts import CLASSIFIER, LANGUAGE_MODEL, describe_model, describe_training
from .nanogpt import read_training_state

_FILE_NAME = "README.md"

# What Transformers uploads as README.md if there is no README.md yet (utils/hub.py, create_and_tag_model_card).
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

# train.py's settings that decide what is learned, in its order (train.py @ 3adf61e); describe_model has the shape.
_SETTINGS = """
init_from dataset gradient_accumulation_steps batch_size block_size dropout learning_rate max_iters weight_decay beta1
beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr dtype
""".split()

_GENERATION = """tokenizer = AutoTokenizer.from_pretrained("path/or/name", trust_remote_code=True)
inputs = tokenizer("\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, do_sample=True, max_new_tokens=100)[0]))

pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(pipe("\\n", max_new_tokens=100)[0]["generated_text"])
"""


def write_card(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Writes a model card into a folder, unless the folder has a README.md of its own.

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
    """Keeps the README.md of a folder while Transformers saves and pushes, which would replace it."""
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
        tags: Tags for the metadata in addition to `nanogpt`.
    """
    class_name = next(cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _KINDS)
    kind, config = _KINDS[class_name], model.config
    sections = [
        f"# nanoGPT {kind.title}",
        "A [nanoGPT](https://github.com/karpathy/nanoGPT) model in the format of Transformers.",
        _make_table({**describe_model(config, class_name), "dtype": str(model.dtype).removeprefix("torch.")}),
        "## Use",
        *_describe_use(config, class_name),
        *_describe_training(config),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _list_limits(model, class_name)),
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=kind.pipeline_tag,
        tags=["nanogpt", *(tag for tag in tags if tag != "nanogpt")],
    )
    return "\n\n".join([f"---\n{data}\n---", *sections]) + "\n"


def _describe_use(config: PreTrainedConfig, class_name: str) -> list[str]:
    auto_class, is_language_model = _KINDS[class_name].auto_class, class_name == LANGUAGE_MODEL
    names, generation, back = auto_class, "", ""
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    if is_language_model:
        names, generation = f"{auto_class}, AutoTokenizer, pipeline", _GENERATION
    if is_language_model and config.tie_word_embeddings:
        back = '\nmodel.to_nanogpt_ckpt("ckpt.pt")  # for nanoGPT\'s train.py and sample.py'
    return [
        f"With Transformers {oldest} or newer, which runs the Python files of this folder:",
        f"```python\nfrom transformers import {names}\n\n"
        f'model = {auto_class}.from_pretrained("path/or/name", trust_remote_code=True)\n{generation}```',
        "With the package hugging-nano-gpt (install it from a clone of its repository):",
        f"```python\nfrom hugging_nano_gpt import {class_name}\n\n"
        f'model = {class_name}.from_pretrained("path/or/name"){back}\n```',
    ]


def _describe_training(config: PreTrainedConfig) -> list[str]:
    state = read_training_state(config)
    if state.iter_num == 0 and not state.config:
        return []
    settings = {f"`{name}`": state.config[name] for name in _SETTINGS if name in state.config}
    return [
        "## Training",
        "The nanoGPT run that wrote the checkpoint of this model. The loss is in nats per token. Later training is "
        "not recorded.",
        _make_table({**describe_training(state), **settings}),
    ]


def _list_limits(model: PreTrainedModel, class_name: str) -> list[str]:
    config = model.config
    if class_name != LANGUAGE_MODEL:
        limits = [f"It reads at most {config.block_size:,} tokens at once."]
        return [*limits, *(["nanoGPT does not train classifiers."] if class_name == CLASSIFIER else [])]
    limits = [
        f"It reads at most {config.block_size:,} tokens at once. `generate` continues past that with the last of "
        "them, as nanoGPT does.",
        "It is a base model: unless it was tuned since, it continues text and does not follow instructions.",
    ]
    if config.vocab_size in GPT2_VOCAB_SIZES and model.generation_config.eos_token_id in (None, GPT2_TOKENS - 1):
        limits.append(
            f"Its {config.vocab_size:,} rows are taken for GPT-2's {GPT2_TOKENS:,} tokens and those that were added."
        )
    if n_suppressed := len(model.generation_config.suppress_tokens or ()):
        limits.append(f"{n_suppressed:,} ids of the vocabulary have no token; `generate` never samples them.")
    if not config.tie_word_embeddings:
        limits.append("It cannot go back to nanoGPT, which ties the output layer to the token embedding.")
    elif config.activation_function != "gelu":
        limits.append("Its numbers differ slightly in today's nanoGPT, which computes the exact GELU.")
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

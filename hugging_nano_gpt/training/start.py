"""Where a run of train.py's starts: a model, a training state and the state of the generator.

init_from names it, or the checkpoint of Trainer's that the run resumes from. What a checkpoint decides is taken from
it; a setting that asks for something else is refused, or a line says that it does not count.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.contents import TrainingState
from ..checkpoint.formats import read_checkpoint
from ..checkpoint.moments import group_by_dimension
from ..convert.gpt2 import import_gpt2
from ..convert.nanogpt import make_model
from ..data.offsets import NANOGPT_SEED
from ..errors import ConversionError
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.characters import read_vocab_size
from .drawing import make_random_state
from .out_dir import Beginning
from .train_settings import TRAIN_DEFAULTS

# GPT-2's 50257 tokens, rounded up for speed, for a data set without meta.pkl (train.py @ 3adf61e).
_PADDED_GPT2_VOCAB_SIZE = 50304

_SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")

# What a checkpoint decides: train.py does not read its own settings of these when it resumes.
_FIXED = ("n_layer", "n_head", "n_embd", "bias")


def start_run(
    settings: Mapping[str, Any], beginning: Beginning, data_dir: Path, rank: int, say: Callable[[str], None]
) -> tuple[NanoGPTLMHeadModel, TrainingState, torch.Tensor]:
    """Makes what a run starts with: a new model, GPT-2, ckpt.pt, or a checkpoint of Trainer's that then loads into it.

    Args:
        settings: All of train.py's settings.
        beginning: What the run begins from.
        data_dir: Folder of the data set; its meta.pkl says the vocabulary size of a new model.
        rank: Rank of this process. New weights are the first one's, as DDP broadcasts them.
        say: Prints train.py's lines.

    Returns:
        model, training_state and random_state of NanoGPTTrainer.

    Raises:
        ConversionError: If init_from is unknown, the batches are longer than the model can read, or a setting asks for
            another model than the checkpoint's.
        CheckpointError: If there is no whole checkpoint, or no GPT-2.
        TokenizerError: If the meta.pkl cannot be read.
    """
    init_from, block_size = beginning.init_from, settings["block_size"]
    state = TrainingState(config=dict(settings))
    meta_path = data_dir / "meta.pkl"
    vocab_size = read_vocab_size(meta_path) if meta_path.exists() else None
    if vocab_size is not None:
        say(f"found vocab_size = {vocab_size} (inside {meta_path})")
    if beginning.folder is not None:
        model, state = _load_folder(settings, beginning.folder, vocab_size, say)
    elif init_from == "scratch":
        say("Initializing a new model from scratch")
        model = _make_new_model(settings, vocab_size, say)
    elif init_from == "resume":
        say(f"Resuming training from {settings['out_dir']}")
        model, state = _load_ckpt(settings, vocab_size, say)
    elif init_from.startswith("gpt2"):
        say(f"Initializing from OpenAI GPT-2 weights: {init_from}")
        model = _load_gpt2(settings, init_from, say)
    else:
        raise ConversionError(
            f"init_from: expected 'scratch', 'resume' or a name that begins with 'gpt2', got {init_from!r}; change it"
        )
    n_parameters = model.num_parameters() - model.transformer.wpe.weight.numel()  # as model.py's get_num_params
    say(f"number of parameters: {n_parameters / 1e6:.2f}M")
    longest = model.config.block_size
    if block_size > longest:
        raise ConversionError(
            f"block_size: expected at most the {longest} tokens that the model of init_from={init_from!r} reads, got "
            f"{block_size}; give --block_size={longest}"
        )
    is_new = beginning.folder is None and init_from == "scratch"  # and has just been made from train.py's seed
    random_state = torch.get_rng_state() if is_new and rank == 0 else make_random_state(model.config, rank)
    if block_size < longest:
        model.crop_block_size(block_size)
    _say_optimizer(model, settings, say)
    if settings["compile"]:
        say("compiling the model... (takes a ~minute)")
    return model.train(), state, random_state


def _say_optimizer(model: NanoGPTLMHeadModel, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Prints what model.py's configure_optimizers prints."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    groups = group_by_dimension(list(sizes), {name: parameter.shape for name, parameter in model.named_parameters()})
    for kind, names in zip(("decayed", "non-decayed"), groups, strict=True):
        count = sum(sizes[name] for name in names)
        say(f"num {kind} parameter tensors: {len(names)}, with {count:,} parameters")
    say(f"using fused AdamW: {'cuda' in str(settings['device'])}")


def _make_new_model(
    settings: Mapping[str, Any], vocab_size: int | None, say: Callable[[str], None]
) -> NanoGPTLMHeadModel:
    if vocab_size is None:
        vocab_size = _PADDED_GPT2_VOCAB_SIZE
        say("defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)")
    torch.manual_seed(NANOGPT_SEED)
    return NanoGPTLMHeadModel(NanoGPTConfig(vocab_size=vocab_size, **{name: settings[name] for name in _SHAPE}))


def _load_gpt2(settings: Mapping[str, Any], name: str, say: Callable[[str], None]) -> NanoGPTLMHeadModel:
    say(f"loading weights from pretrained gpt: {name}")
    gpt2 = import_gpt2(name, dropout=settings["dropout"])
    say(f"forcing vocab_size={gpt2.config.vocab_size}, block_size={gpt2.config.block_size}, bias=True")
    say(f"overriding dropout rate to {settings['dropout']}")
    shape = {name: getattr(gpt2.config, name) for name in (*_SHAPE, "vocab_size")}
    model = NanoGPTLMHeadModel(NanoGPTConfig(**shape))  # with the exact GELU, which train.py computes here too
    model.load_state_dict(gpt2.state_dict())
    return model


def _load_ckpt(
    settings: Mapping[str, Any], vocab_size: int | None, say: Callable[[str], None]
) -> tuple[NanoGPTLMHeadModel, TrainingState]:
    path = Path(settings["out_dir"]) / "ckpt.pt"
    checkpoint = read_checkpoint(path)
    model = make_model(NanoGPTLMHeadModel, path, checkpoint, dropout=settings["dropout"])
    config = _keep_shape(settings, model.config, path, vocab_size, say)
    return model, replace(checkpoint.training_state, config=config)


def _load_folder(
    settings: Mapping[str, Any], folder: Path, vocab_size: int | None, say: Callable[[str], None]
) -> tuple[NanoGPTLMHeadModel, TrainingState]:
    model = NanoGPTLMHeadModel.from_pretrained(folder, dropout=settings["dropout"])
    state, block_size = model.nanogpt_training_state, model.config.block_size
    say(f"Resuming training from {folder} (iteration {state.iter_num})")
    if settings["block_size"] != block_size:
        raise ConversionError(
            f"{folder}: block_size cannot change: expected {block_size}, got {settings['block_size']}; give "
            f"--block_size={block_size}"
        )
    return model, replace(state, config=_keep_shape(settings, model.config, folder, vocab_size, say))


def _keep_shape(
    settings: Mapping[str, Any],
    config: NanoGPTConfig,
    path: Path,
    vocab_size: int | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the settings with the checkpoint's shape, which train.py uses too, regardless of its flags.

    Other values are refused, except train.py's defaults: they may not have been given at all, so a line says what the
    checkpoint has.
    """
    kept = {name: getattr(config, name) for name in _FIXED}
    other = {name: settings[name] for name in kept if settings[name] != kept[name]}
    faults = [
        f"{name}: expected {kept[name]}, got {value}" for name, value in other.items() if value != TRAIN_DEFAULTS[name]
    ]
    if vocab_size is not None and vocab_size > config.vocab_size:
        faults.append(f"vocab_size: expected at most {config.vocab_size}, got {vocab_size} in the data set's meta.pkl")
    if faults:
        raise ConversionError(
            f"{path}: a checkpoint's model cannot change: {'; '.join(faults)}; leave them out and give the run's own "
            f"--dataset, or begin with --init_from=scratch in another --out_dir"
        )
    if other:
        say(f"{', '.join(f'{name}={kept[name]}' for name in other)}, as {path} has it")
    return {**settings, **kept}

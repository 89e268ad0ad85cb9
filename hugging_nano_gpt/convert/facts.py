"""What people are told about a model: one table of facts for the model card, `inspect` and the playground.

Everything is read from the configuration, so it is cheap, and right for sharded and offloaded models too.
"""

from transformers import PreTrainedConfig

from ..checkpoint.contents import NO_VAL_LOSS, TrainingState
from ..checkpoint.layout import count_parameters
from .tensors import get_model_args

_ACTIVATIONS = {
    "gelu": "exact GELU, nanoGPT's since June 2023",
    "gelu_new": "tanh GELU, nanoGPT's before June 2023",
    "gelu_pytorch_tanh": "tanh GELU as torch computes it",
}

LANGUAGE_MODEL, CLASSIFIER = "NanoGPTLMHeadModel", "NanoGPTForSequenceClassification"


def describe_model(config: PreTrainedConfig, class_name: str = LANGUAGE_MODEL) -> dict[str, str]:
    """Returns the shape of a model, by the name of its class."""
    n_params, n_params_total = count_model_parameters(config, class_name)
    facts = {
        "layers": f"{config.n_layer}",
        "heads": f"{config.n_head}",
        "width": f"{config.n_embd}",
        "block size": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "biases": "yes" if config.bias else "no",
        "dropout": f"{config.dropout}",
        "activation": _ACTIVATIONS[config.activation_function],
    }
    if class_name == LANGUAGE_MODEL:
        facts["output layer"] = "tied to the token embedding" if config.tie_word_embeddings else "has its own weights"
    if class_name == CLASSIFIER:
        facts["labels"] = f"{config.num_labels}"
    return {**facts, "parameters": f"{n_params_total:,}, or {n_params:,} as nanoGPT counts, without the positions"}


def describe_training(state: TrainingState) -> dict[str, str]:
    """Returns how far nanoGPT trained a model."""
    loss = state.best_val_loss
    return {
        "iteration": f"{state.iter_num:,}",
        "validation loss": "not measured" if loss >= NO_VAL_LOSS else f"{loss:.4f}",
    }


def count_model_parameters(config: PreTrainedConfig, class_name: str = LANGUAGE_MODEL) -> tuple[int, int]:
    """Returns the number of parameters as nanoGPT counts them, without the position embedding, and in total."""
    has_own_head = class_name == LANGUAGE_MODEL and not config.tie_word_embeddings
    without_positions, total = count_parameters(get_model_args(config), is_tied=not has_own_head)
    n_scores = config.num_labels * config.n_embd if class_name == CLASSIFIER else 0
    return without_positions + n_scores, total + n_scores

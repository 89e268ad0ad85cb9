"""NanoGPTConfig: nanoGPT's seven `model_args` under their own names, as a Transformers configuration.

`NanoGPTConfig(**checkpoint["model_args"])` is the whole conversion. In addition there are the activation, which
nanoGPT changed in June 2023 without recording it, the chunk size of the loss, and fields that Transformers 5 expects
every model to declare. This file travels with saved models as remote code: Transformers runs it before the others, so
it is the one that refuses releases that are too old.
"""

import json
from typing import Any

import torch
import transformers

# The oldest minor release of Transformers in which the code of a saved folder loads and gives the same bits. 5.2 and
# 5.3 load it without tying the weights, and older ones lack a module that it imports.
OLDEST_TRANSFORMERS = (5, 4)

if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
    raise ImportError(
        f"configuration_nano_gpt.py: Transformers is too old for this model: expected "
        f"{'.'.join(map(str, OLDEST_TRANSFORMERS))} or newer, got {transformers.__version__}; "
        f"pip install --upgrade transformers"
    )

# nanoGPT has computed the exact GELU since 2023-06-14 (karpathy/nanoGPT f08abb45), and before that the tanh formula,
# as minGPT and llm.c do; build-nanogpt uses torch's own tanh GELU, which rounds differently.
ACTIVATION_FUNCTIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh")

# GPT-2's vocabulary: the number of tokens, and of rows in a model, which nanoGPT may pad (train.py @ 3adf61e).
GPT2_TOKENS = 50257
GPT2_VOCAB_SIZES = range(GPT2_TOKENS, 51201)


class NanoGPTConfig(transformers.PreTrainedConfig):
    """The configuration of a nanoGPT model. The defaults are those of nanoGPT's GPTConfig (model.py @ 3adf61e).

    Args:
        block_size: The longest sequence that the model can read, in tokens: the number of learned positions.
        vocab_size: Rows of the token embedding. 50304 is GPT-2's 50257, padded to a multiple of 64.
        n_layer: Number of transformer blocks.
        n_head: Number of attention heads; divides n_embd.
        n_embd: Width of the residual stream.
        dropout: Dropout probability for embeddings, attention and residuals, in [0, 1).
        bias: Whether the Linear and LayerNorm modules have biases. lm_head never has one.
        activation_function: "gelu" (exact, nanoGPT since 2023-06-14), "gelu_new" (tanh, older nanoGPT, minGPT,
            llm.c) or "gelu_pytorch_tanh" (tanh, build-nanogpt).
        tie_word_embeddings: Whether lm_head is the token embedding, as in nanoGPT since 2023-01-14.
        loss_chunk_size: The number of tokens whose logits are in memory at once, to save memory in training. None
            for all of them, as in nanoGPT; only this gives nanoGPT's loss bit for bit.
        use_cache: Whether a forward pass in eval mode returns its keys and values.
        bos_token_id, eos_token_id, pad_token_id: The special tokens, if the vocabulary has them.
        nanogpt_training_state: The checkpoint's iter_num, best_val_loss and config, for to_nanogpt_ckpt. A saved
            folder keeps those values of config that JSON stores exactly.

    Raises:
        ValueError: If a value is impossible; the message lists every such value and why.
    """

    model_type = "hugging_nano_gpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    # c_attn computes query, key and value together, so its output is gathered before it is split, as Phi-3's qkv_proj.
    # lm_head is sharded by rows of the vocabulary, so wte, which is tied to it, has to be too; Transformers adds this
    # on its own only to an embedding that is called "embed_tokens".
    base_model_tp_plan = {
        "wte": "embedding_rowwise",
        "h.*.attn.c_attn": "colwise_rep",
        "h.*.attn.c_proj": "rowwise_rep",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
    base_model_fsdp_plan = {
        "wte": "free_full_weight",
        "wpe": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float | int = 0.0
    bias: bool = True
    activation_function: str = "gelu"
    tie_word_embeddings: bool = True
    loss_chunk_size: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    nanogpt_training_state: dict | None = None

    def __post_init__(self, **kwargs):
        dtype = self.dtype or kwargs.get("torch_dtype")  # as older releases of Transformers named it
        faults = self._find_faults(dtype)
        if faults:
            raise ValueError(f"{type(self).__name__}: impossible values: {'; '.join(faults)}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Makes a configuration; one that AutoConfig reads keeps the file's fields until the weights are loaded."""
        as_read = write_fields(config_dict)
        made = super().from_dict(config_dict, **kwargs)
        if "name_or_path" in kwargs:
            (made[0] if isinstance(made, tuple) else made)._as_read = as_read
        return made

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they are saved."""
        fields = super().to_dict()
        fields.pop("_as_read", None)
        state = fields.get("nanogpt_training_state")
        if state is not None:
            config = {
                name: value for name, value in state.get("config", {}).items() if is_exact_in_json({name: value})
            }
            fields["nanogpt_training_state"] = {**state, "config": config}
        return fields

    def _find_faults(self, dtype: Any) -> list[str]:
        sizes = {name: getattr(self, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
        bad_sizes = {n: v for n, v in sizes.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1}
        faults = [f"{name}: expected a positive int, got {value!r}" for name, value in bad_sizes.items()]
        if not {"n_embd", "n_head"} & bad_sizes.keys() and self.n_embd % self.n_head:
            faults.append(
                f"n_embd: expected a multiple of n_head, because every head gets n_embd / n_head of the width, "
                f"got n_embd={self.n_embd!r} and n_head={self.n_head!r}"
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, float | int) or not 0 <= self.dropout < 1:
            faults.append(f"dropout: expected a probability in [0, 1), got {self.dropout!r}")
        for name in ("bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                faults.append(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
            faults.append(f"dtype: expected one that this torch has, such as 'float32', got {dtype!r}")
        chunk = self.loss_chunk_size
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            faults.append(f"loss_chunk_size: expected a positive int or None, got {chunk!r}")
        if self.activation_function not in ACTIVATION_FUNCTIONS:
            faults.append(
                f"activation_function: expected one of {', '.join(map(repr, ACTIVATION_FUNCTIONS))}, because no "
                f"nanoGPT computes another, got {self.activation_function!r}"
            )
        return faults


def write_fields(config_dict: dict[str, Any]) -> str:
    """Returns the fields that get_config_dict has read from a file as text, to compare two readings."""
    fields = {name: value for name, value in config_dict.items() if name != "_commit_hash"}
    return json.dumps(fields, sort_keys=True, default=str)


def is_exact_in_json(value: Any) -> bool:
    """Returns whether JSON stores a value exactly."""
    if type(value) is dict:
        return all(type(key) is str and is_exact_in_json(item) for key, item in value.items())
    if type(value) is list:
        return all(is_exact_in_json(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)

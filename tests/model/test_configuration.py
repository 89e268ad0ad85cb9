"""NanoGPTConfig: nanoGPT's names, Transformers' aliases, and impossible values, which are refused."""

import pytest
from transformers import AutoConfig

from hugging_nano_gpt import NanoGPTConfig

from ..helpers.tiny import MODEL_ARGS


def test_config_from_model_args_has_them_under_their_names():
    config = NanoGPTConfig(**MODEL_ARGS)
    assert {name: getattr(config, name) for name in MODEL_ARGS} == MODEL_ARGS
    assert config.activation_function == "gelu"
    assert config.tie_word_embeddings is True


def test_config_defaults_are_those_of_nanogpt():
    config = NanoGPTConfig()
    assert (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd) == (
        1024,
        50304,
        12,
        12,
        768,
    )
    assert (config.dropout, config.bias) == (0.0, True)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("hidden_size", "n_embd"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
        ("max_position_embeddings", "block_size"),
    ],
)
def test_config_alias_reads_and_writes_nanogpt_name(alias, name):
    config = NanoGPTConfig(**MODEL_ARGS)
    assert getattr(config, alias) == MODEL_ARGS[name]
    setattr(config, alias, 64)
    assert getattr(config, name) == 64
    assert getattr(NanoGPTConfig(**{alias: 48}), name) == 48


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, r"n_embd: expected a multiple of n_head, .*n_embd=30 and n_head=4"),
        ({"n_layer": 0}, r"n_layer: expected a positive int, got 0"),
        ({"block_size": -1}, r"block_size: expected a positive int, got -1"),
        ({"vocab_size": None}, r"vocab_size: expected a positive int, got None"),
        ({"n_head": 4.0}, r"n_head: expected a positive int, got 4\.0"),
        ({"n_embd": True}, r"n_embd: expected a positive int, got True"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, r"dropout: .*got -0\.1"),
        ({"dropout": "0.1"}, r"dropout: .*got '0\.1'"),
        ({"dropout": float("nan")}, r"dropout: .*got nan"),
        ({"bias": 1}, r"bias: expected True or False, got 1"),
        ({"activation_function": "relu"}, r"activation_function: expected one of 'gelu', .*got 'relu'"),
    ],
)
def test_config_with_impossible_value_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        NanoGPTConfig(**{**MODEL_ARGS, **values})


def test_config_with_several_impossible_values_lists_them_all():
    with pytest.raises(ValueError, match=r"n_layer: .*; dropout: .*; activation_function: "):
        NanoGPTConfig(n_layer=0, dropout=2, activation_function="swish")


def test_config_saved_and_loaded_is_the_same(tmp_path):
    config = NanoGPTConfig(**MODEL_ARGS, activation_function="gelu_new", tie_word_embeddings=False, eos_token_id=3)
    config.save_pretrained(tmp_path)
    for loaded in (NanoGPTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is NanoGPTConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.eos_token_id == 3

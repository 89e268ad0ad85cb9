"""Which rows of a vocabulary are tokens: by the tokenizer, a resize, or the number of rows."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hugging_nano_gpt import (
    CharacterTable,
    NanoGPTConfig,
    NanoGPTLMHeadModel,
    TokenizerError,
    build_character_tokenizer,
    convert_to_folder,
    export_gguf,
    export_gpt2,
    export_onnx,
    fit_vocabulary,
    sample_text,
    write_meta,
)
from hugging_nano_gpt.convert.card import make_card
from hugging_nano_gpt.export import onnx
from hugging_nano_gpt.training import NanoGPTTrainer, TokenDataset, training_arguments_from_nanogpt

from ..helpers.trace import TRACE_DIR

END = 50256


def make(n_rows, **settings):
    """Makes a very small model, with the generation config that follows from its number of rows."""
    torch.manual_seed(0)
    config = NanoGPTConfig(block_size=16, vocab_size=n_rows, n_layer=1, n_head=1, n_embd=4)
    model = NanoGPTLMHeadModel(config).eval()
    model.generation_config.update(**settings)
    return model


def load(folder, n_rows):
    make(n_rows).to_nanogpt_ckpt(folder / "ckpt.pt", overwrite=True)
    return NanoGPTLMHeadModel.from_nanogpt_ckpt(folder / "ckpt.pt")


def make_word_tokenizer(n_tokens, **special):
    backend = Tokenizer(models.WordLevel({f"t{index}": index for index in range(n_tokens)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def prefer(model, index):
    """Makes one token the most likely everywhere."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[index] = 100.0
    return model


def generate(model, **kwargs):
    ids = model.generate(torch.tensor([[1, 2]]), do_sample=False, max_new_tokens=5, **kwargs)
    return ids[0, 2:].tolist()


def get_suppressed(model):
    return model.generation_config.suppress_tokens or []


# without a tokenizer: by the number of rows


@pytest.mark.parametrize(
    ("n_rows", "n_tokens"),
    [(50257, 50257), (50258, 50258), (50260, 50260), (50304, 50257), (50368, 50257), (50432, 50257), (51200, 50257)],
)
def test_rows_of_gpt2_start_and_end_as_gpt2_does(tmp_path, n_rows, n_tokens):
    settings = load(tmp_path, n_rows).generation_config
    assert (settings.bos_token_id, settings.eos_token_id) == (END, END)
    assert (settings.suppress_tokens or []) == list(range(n_tokens, n_rows))


@pytest.mark.parametrize("n_rows", [65, 50256, 51264])
def test_other_rows_start_at_0_and_have_no_end(tmp_path, n_rows):
    settings = load(tmp_path, n_rows).generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.suppress_tokens) == (0, None, None)


# after a resize, or with a new token


@pytest.mark.parametrize(
    ("before", "padding", "asked", "rows", "suppressed"),
    [
        (50304, range(50257, 50304), (50258,), 50258, []),
        (50304, range(50257, 50304), (50258, 64), 50304, range(50258, 50304)),
        (50304, range(50257, 50304), (50310,), 50310, []),
        (50304, range(50257, 50304), (None, 128), 50304, range(50257, 50304)),
        (50304, range(50257, 50304), (None,), 50304, range(50257, 50304)),
        (65, [], (70,), 70, []),
        (65, [], (66, 64), 128, range(66, 128)),
        (65, [], (None, 64), 128, range(65, 128)),
        (65, [3], (66, 8), 72, [3, *range(66, 72)]),
        (80, [3, 7, *range(70, 80)], (75,), 75, [3, 7]),
        (80, [3, *range(70, 80)], (60,), 60, [3]),
    ],
)
def test_resize_revises_what_is_suppressed(before, padding, asked, rows, suppressed):
    model = make(before, suppress_tokens=list(padding) or None)
    model.resize_token_embeddings(*asked, mean_resizing=False)
    assert model.config.vocab_size == rows
    assert get_suppressed(model) == list(suppressed)


@pytest.mark.parametrize("asked", [(50258,), (50258, 64), (50300,)])
def test_token_added_by_a_resize_is_generated(tmp_path, asked):
    model = load(tmp_path, 50304)
    assert generate(prefer(model, 50257), eos_token_id=None)[0] != 50257
    model.resize_token_embeddings(*asked, mean_resizing=False)
    assert generate(prefer(model, 50257)) == [50257] * 5


def test_resize_that_cuts_special_tokens_off_forgets_them():
    model = make(50304, bos_token_id=END, eos_token_id=END, pad_token_id=3)
    model.resize_token_embeddings(65)
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (None, None, 3)


@pytest.mark.parametrize("ends", [50257, [END, 50260]])
def test_spare_row_that_ends_a_text_ends_it(tmp_path, ends):
    """Trainer sets the model's eos_token_id to a new one of the tokenizer."""
    model = load(tmp_path, 50304)
    model.generation_config.eos_token_id = ends
    last = ends if isinstance(ends, int) else ends[-1]
    assert generate(prefer(model, last)) == [last]
    assert last in get_suppressed(model)  # generate does not change the generation config


@pytest.mark.parametrize(
    "suppressing",
    [{"suppress_tokens": [3]}, {"generation_config": GenerationConfig(suppress_tokens=[3])}],
    ids=["argument", "generation_config"],
)
def test_end_that_a_call_suppresses_is_not_generated(suppressing):
    model = prefer(make(64), 3)
    assert generate(model, eos_token_id=3) == [3]
    assert 3 not in generate(model, eos_token_id=3, **suppressing)


def test_end_among_the_tokens_that_a_model_suppresses_is_not_generated():
    model = prefer(make(64, suppress_tokens=[3, *range(60, 64)]), 3)
    assert 3 not in generate(model, eos_token_id=3)


def test_spare_row_that_a_call_suppresses_is_not_generated():
    model = prefer(make(64, suppress_tokens=[60, 61, 62, 63], eos_token_id=62), 62)
    assert generate(model) == [62]
    assert generate(model, generation_config=copy.deepcopy(model.generation_config)) == [62]
    assert 62 not in generate(model, suppress_tokens=[60, 61, 62, 63])


def test_token_added_in_a_spare_row_is_generated_after_fit_vocabulary(tmp_path):
    model, tokenizer = prefer(load(tmp_path, 64), 40), make_word_tokenizer(40, eos_token="t7", pad_token="t8")
    fit_vocabulary(model, tokenizer)
    assert 40 not in generate(model)
    tokenizer.add_tokens("<new>")
    fit_vocabulary(model, tokenizer)
    assert generate(model) == [40] * 5
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (7, 7, 8)


def test_trainer_with_a_tokenizer_makes_its_new_tokens_generated(tmp_path):
    model, tokenizer = prefer(load(tmp_path, 64), 40), make_word_tokenizer(40)
    fit_vocabulary(model, tokenizer)
    tokenizer.add_tokens("<new>")
    config = {"device": "cpu", "compile": False, "out_dir": str(tmp_path)}
    args, _ = training_arguments_from_nanogpt(config, eval_strategy="no")
    NanoGPTTrainer(model, args, TokenDataset(TRACE_DIR / "train.bin", 16), processing_class=tokenizer)
    assert generate(model) == [40] * 5


def test_fit_vocabulary_keeps_what_the_user_set():
    model = make(64, suppress_tokens=[3], eos_token_id=[5, 6], temperature=0.5)
    fit_vocabulary(model, make_word_tokenizer(60, eos_token="t5"))
    settings = model.generation_config
    assert (settings.suppress_tokens, settings.eos_token_id) == ([3, 60, 61, 62, 63], [5, 6])
    assert settings.temperature == 0.5


# with a tokenizer


def test_convert_takes_ids_and_specials_of_the_tokenizer(tmp_path):
    make(50304).to_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    make_word_tokenizer(50277, eos_token="t0").save_pretrained(tmp_path / "tokenizer")
    convert_to_folder(tmp_path / "ckpt.pt", tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (0, 0)
    assert settings["suppress_tokens"] == list(range(50277, 50304))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "27 ids of the vocabulary have no token" in card
    assert "GPT-2" not in card


def test_convert_without_specials_keeps_none_of_gpt2(tmp_path):
    make(50304).to_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    make_word_tokenizer(50300).save_pretrained(tmp_path / "tokenizer")
    written = convert_to_folder(tmp_path / "ckpt.pt", tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    settings = written.model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id) == (0, None)


@pytest.fixture
def padded(tmp_path):
    """A checkpoint of 28 characters in 64 rows; the most likely row has no character."""
    prefer(make(64), 40).to_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    table = CharacterTable(tuple("\nabcdefghijklmnopqrstuvwxyz "))
    write_meta(table, tmp_path / "meta.pkl")
    return tmp_path


def test_rows_without_a_character_are_never_generated(padded, capsys):
    written = convert_to_folder(padded / "ckpt.pt", padded / "out", meta_path=padded / "meta.pkl")
    assert get_suppressed(written.model) == list(range(28, 64))
    assert max(generate(NanoGPTLMHeadModel.from_pretrained(padded / "out"))) < 28
    sample_text(padded / "ckpt.pt", "a", num_samples=1, max_new_tokens=9, meta_path=padded / "meta.pkl", device="cpu")
    assert len(capsys.readouterr().out.split("\n-----")[0]) == 10


@pytest.mark.parametrize("export", [export_gpt2, export_onnx])
def test_exported_folders_follow_the_tokenizer(padded, monkeypatch, export):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx, "_make_graph", lambda plain: None)  # it takes seconds, and is not tested here
    monkeypatch.setattr(onnx, "_write", lambda graph, folder: None)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(padded / "ckpt.pt")
    table = CharacterTable(tuple("\nabcdefghijklmnopqrstuvwxyz "))
    export(model, padded / "out", tokenizer=build_character_tokenizer(table))
    settings = json.loads((padded / "out" / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == list(range(28, 64))
    assert get_suppressed(model) == []  # the model itself does not change


def test_exported_gguf_follows_the_tokenizer(padded, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(padded / "ckpt.pt")
    fit_vocabulary(model, make_word_tokenizer(40))
    export_gguf(
        model,
        tmp_path / "out.gguf",
        tokenizer=build_character_tokenizer(CharacterTable(tuple(map(chr, range(65, 115))))),
    )
    field = gguf.GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.suppress_tokens"]
    assert field.contents() == list(range(50, 64))


# tokenizers that do not fit the model


@pytest.mark.parametrize(("n_characters", "n_rows"), [(5, 96), (65, 50304), (1, 3), (30, 65)])
def test_meta_of_far_too_few_characters_is_refused(tmp_path, n_characters, n_rows):
    make(n_rows).to_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    write_meta(CharacterTable(tuple(map(chr, range(97, 97 + n_characters)))), tmp_path / "meta.pkl")
    with pytest.raises(
        TokenizerError, match=f"meta.pkl: expected about {n_rows} tokens.* got {n_characters}; give the"
    ):
        convert_to_folder(tmp_path / "ckpt.pt", tmp_path / "out", meta_path=tmp_path / "meta.pkl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("n_characters", "n_rows"), [(65, 66), (60, 65), (90, 100)])
def test_meta_of_fewer_characters_warns(tmp_path, n_characters, n_rows):
    make(n_rows).to_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    write_meta(CharacterTable(tuple(map(chr, range(97, 97 + n_characters)))), tmp_path / "meta.pkl")
    written = convert_to_folder(tmp_path / "ckpt.pt", tmp_path / "out", meta_path=tmp_path / "meta.pkl")
    assert any(f"{n_characters} tokens for {n_rows} rows: the other" in note for note in written.notes)


def test_tokenizer_with_an_id_beyond_the_rows_is_refused():
    tokenizer = make_word_tokenizer(60)
    tokenizer.add_tokens([f"<{index}>" for index in range(6)])
    with pytest.raises(
        TokenizerError, match="expected at most 65 tokens, as the model has rows, got 66 with ids up to 65"
    ):
        fit_vocabulary(make(65), tokenizer)


def test_card_of_a_model_with_other_ends_does_not_speak_of_gpt2():
    model = make(50304)
    assert "GPT-2's 50,257" in make_card(model)
    model.generation_config = GenerationConfig(eos_token_id=0)
    assert "GPT-2" not in make_card(model)

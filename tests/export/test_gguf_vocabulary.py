"""Tokenizers in GGUF files: the same tokens under the same ids; what llama.cpp has no equivalent of is refused."""

import json
import re

import pytest
import tiktoken
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from hugging_nano_gpt import (
    CharacterTable,
    TokenizerError,
    build_character_tokenizer,
    build_tiktoken_tokenizer,
    export_gguf,
    export_model,
    read_meta,
)
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.encodings import PATTERNS, make_encoding
from ..helpers.ggufs import UNICODE, export_and_read, make_kind, read_metadata

gguf = pytest.importorskip("gguf")


def unescape(token: str) -> bytes:
    """Reads a token as llama.cpp's "rwkv" does."""
    return re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), token.encode())


def test_characters_are_written_as_their_bytes(tmp_path):
    tokenizer = build_character_tokenizer(CharacterTable(tuple(UNICODE)))
    n = len(UNICODE)
    model = make_kind(vocab_size=n + 3)
    model.generation_config.suppress_tokens = [2, n + 1]
    lost = export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    found = read_metadata(gguf.GGUFReader(tmp_path / "m.gguf"))
    tokens = found["tokenizer.ggml.tokens"]
    assert [unescape(token).decode() for token in tokens[:n]] == list(UNICODE)
    assert all(token.isascii() and token.isprintable() for token in tokens)
    assert [unescape(token) for token in tokens[n:]] == [b"\xc3", b"\xc4", b"\xcc"]
    assert found["tokenizer.ggml.token_type"] == [1] * n + [5] * 3
    assert found["tokenizer.ggml.suppress_tokens"] == [2, n, n + 1, n + 2]
    assert found["tokenizer.ggml.model"] == "rwkv"
    assert {name for name in found if name.endswith("_id")} == set()
    assert [found[f"tokenizer.ggml.add_{name}"] for name in ("bos_token", "eos_token", "space_prefix")] == [False] * 3
    assert any("the bytes '0xd0', '0xe2', '0xe4', '0xe6', '0xef', ... (6 in all), as" in sentence for sentence in lost)
    assert any(f"resize_token_embeddings({n + 9})" in sentence for sentence in lost)
    model.resize_token_embeddings(n + 11)
    lost = export_gguf(model, tmp_path / "more.gguf", tokenizer=tokenizer)
    assert not any("hang" in sentence for sentence in lost)
    tokens = read_metadata(gguf.GGUFReader(tmp_path / "more.gguf"))["tokenizer.ggml.tokens"]
    assert [unescape(token)[:1].hex() for token in tokens[n:]] == "c3 c4 cc d0 e2 e4 e6 ef f0 ff ff".split()
    assert len(set(tokens)) == n + 11


def test_demo_characters_have_no_traps(tmp_path):
    conversion = export_model(CKPT_PATH, tmp_path / "m.gguf", to="gguf", meta_path=META_PATH, file_type="q8_0")
    assert [note.split()[0] for note in conversion.notes] == [
        "assumed:",
        "llama.cpp",  # writes a chat with characters that the model lacks
        "weights",
        "llama.cpp",
        "exact",
    ]
    found = read_metadata(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert [unescape(token).decode() for token in found["tokenizer.ggml.tokens"]] == list(
        read_meta(META_PATH).characters
    )


def test_special_tokens_of_a_character_tokenizer(tmp_path):
    table = CharacterTable(tuple("\nabc"))
    tokenizer = build_character_tokenizer(table, unknown_id=2)
    tokenizer.eos_token = "\n"
    found = read_metadata(export_and_read(make_kind(vocab_size=4), tmp_path / "a.gguf", tokenizer=tokenizer))
    ids = {name: value for name, value in found.items() if name.endswith("_id")}
    assert ids == {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.unknown_token_id": 2}
    assert found["tokenizer.ggml.token_type"] == [1] * 4  # the newline is still a character
    tokenizer = build_character_tokenizer(table)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.add_tokens(["<b>"])
    lost = export_gguf(make_kind(vocab_size=6), tmp_path / "b.gguf", tokenizer=tokenizer)
    found = read_metadata(gguf.GGUFReader(tmp_path / "b.gguf"))
    assert found["tokenizer.ggml.tokens"] == [r"\x0a", "a", "b", "c", "<|end|>", "<b>"]
    assert found["tokenizer.ggml.token_type"] == [1, 1, 1, 1, 3, 4]
    assert found["tokenizer.ggml.eos_token_id"] == 4
    assert any("the bytes '0x3c', as" in sentence for sentence in lost)  # "<" begins a token, and is not a token


def export_with_template(path, characters, template, added=()):
    """Exports a model of characters; returns the chat templates in the file, and what is not kept."""
    tokenizer = build_character_tokenizer(CharacterTable(tuple(characters)))
    tokenizer.add_special_tokens({"extra_special_tokens": list(added)})
    tokenizer.chat_template = template
    lost = export_gguf(make_kind(vocab_size=len(tokenizer) + 8), path, tokenizer=tokenizer)
    found = read_metadata(gguf.GGUFReader(path))
    return {name: value for name, value in found.items() if "chat_template" in name}, lost


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
)


def test_chat_template_is_written(tmp_path):
    written, _ = export_with_template(tmp_path / "m.gguf", "\nabc", TEMPLATE)
    assert written == {"tokenizer.chat_template": TEMPLATE}


def test_chat_templates_are_written_under_their_names(tmp_path):
    written, _ = export_with_template(tmp_path / "m.gguf", "\nabc", {"default": TEMPLATE, "tool_use": "{{ tools }}"})
    assert written == {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.chat_template": TEMPLATE,
    }


def test_bpe_with_a_chat_template_keeps_it_and_lacks_no_characters(tmp_path):
    tokenizer = build_tiktoken_tokenizer(make_encoding())
    tokenizer.chat_template = TEMPLATE
    assert export_gguf(make_kind(vocab_size=len(tokenizer)), tmp_path / "m.gguf", tokenizer=tokenizer)[1:] == ()
    assert read_metadata(gguf.GGUFReader(tmp_path / "m.gguf"))["tokenizer.chat_template"] == TEMPLATE


@pytest.mark.parametrize(
    ("characters", "template", "added", "message"),
    [
        (
            "\nabc",
            TEMPLATE,
            (),
            r"by the tokenizer's chat template, .* lacks, '<', '>', 'e', 'r', 's', \.\.\. \(7 in all\)",
        ),
        ("\nabc", TEMPLATE, ("<|user|>",), r"by the tokenizer's chat template, .* lacks, '>': ask it for completions"),
        ("\nabc>", TEMPLATE, ("<|user|>",), None),
        ("\nabcersu<|>", TEMPLATE, (), None),
        ("\nabc", None, (), r"as ChatML, because the tokenizer has no chat template, .* lacks, '<', '>', '_', 'd'"),
        ("\n_adeimnrstu<|>", None, (), None),
        ("\nabc", "{{ raise_exception('two messages') }}", (), None),
    ],
)
def test_chat_that_brings_characters_the_model_lacks_is_told(tmp_path, characters, template, added, message):
    _, lost = export_with_template(tmp_path / "m.gguf", characters, template, added)
    notes = [sentence for sentence in lost if "writes a chat" in sentence]
    if message is None:
        assert notes == []
    else:
        assert len(notes) == 1
        assert re.search(message, notes[0]), notes


def test_bpe_is_written_with_its_merges(tmp_path):
    encoding = make_encoding(gap=3)
    tokenizer = build_tiktoken_tokenizer(encoding)
    model = make_kind(vocab_size=320)
    assert export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)[1:] == ()
    found = read_metadata(gguf.GGUFReader(tmp_path / "m.gguf"))
    tokens, by_id = found["tokenizer.ggml.tokens"], {index: token for token, index in tokenizer.get_vocab().items()}
    assert tokens == [by_id.get(index, f"[PAD{index}]") for index in range(320)]
    end = encoding.eot_token
    unused = sorted({*range(320)} - by_id.keys())
    assert len(unused) == 320 - encoding.n_vocab + 3
    kinds = {end: 3, **dict.fromkeys(unused, 5)}
    assert found["tokenizer.ggml.token_type"] == [kinds.get(index, 1) for index in range(320)]
    assert found["tokenizer.ggml.suppress_tokens"] == unused
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    ids = {name: value for name, value in found.items() if name.endswith("_id")}
    assert ids == {f"tokenizer.ggml.{name}_token_id": end for name in ("bos", "eos", "padding")}
    assert len(found["tokenizer.ggml.merges"]) == encoding.n_vocab - 1 - 3 - 256
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "We'll see: 1234567 o'clock,\n\n  he SAID \xe9\u4e2d<|endoftext|>"
    assert theirs(text).input_ids == tokenizer(text).input_ids
    assert theirs.decode(theirs(text).input_ids) == text


def test_gpt2_as_transformers_writes_it_is_taken(tmp_path):
    ours = build_tiktoken_tokenizer(make_encoding())
    merges = json.loads(ours.backend_tokenizer.to_str())["model"]["merges"]
    theirs = GPT2Tokenizer(vocab=ours.get_vocab(), merges=[tuple(merge) for merge in merges])
    model = make_kind(vocab_size=320)
    found = [
        read_metadata(export_and_read(model, tmp_path / name / "m.gguf", tokenizer=tokenizer))
        for name, tokenizer in (("ours", ours), ("theirs", theirs))
    ]
    found[1]["tokenizer.ggml.padding_token_id"] = found[0]["tokenizer.ggml.padding_token_id"]  # GPT-2 has none
    assert found[0] == found[1]


def test_bpe_without_an_end_is_told(tmp_path):
    tokenizer = build_tiktoken_tokenizer(make_encoding(special_tokens=("<|x|>",)))
    lost = export_gguf(make_kind(vocab_size=320), tmp_path / "a.gguf", tokenizer=tokenizer)
    assert any("llama.cpp ends at token 11," in sentence for sentence in lost)
    tokenizer.eos_token = "<|x|>"
    lost = export_gguf(make_kind(vocab_size=320), tmp_path / "b.gguf", tokenizer=tokenizer)
    assert not any("token 11" in sentence for sentence in lost)


def wrap(model, **parts) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def make_refused() -> dict[str, tuple]:
    characters = {"a": 0, "b": 1}
    merge_free = tiktoken.Encoding(
        "bytes", pat_str=PATTERNS["gpt2"], mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    adding = processors.TemplateProcessing(single="a $A", special_tokens=[("a", 0)])
    unreachable = make_encoding(merges=(b"qqxzj", b"qx", b"xz", b"qxz"))
    return {
        "cut": (build_tiktoken_tokenizer(make_encoding(PATTERNS["cl100k_base"])), "text split by {'type'"),
        "bytes": (build_tiktoken_tokenizer(merge_free), "no merges, but text split by"),
        "unreachable": (build_tiktoken_tokenizer(unreachable), "tokens that no merges lead to"),
        "words": (wrap(models.BPE({"ab": 0, "c": 1}, [])), "no merges, but tokens of several characters as 'ab'"),
        "model": (wrap(models.WordLevel(characters, unk_token="a")), "a WordLevel model"),
        "normalizer": (wrap(models.BPE(characters, []), normalizer=normalizers.NFC()), "a normalizer, NFC"),
        "fallback": (wrap(models.BPE(characters, [], byte_fallback=True)), "byte_fallback=True"),
        "adding": (wrap(models.BPE(characters, []), post_processor=adding), "tokens added to every text"),
    }


REFUSED = make_refused()


@pytest.mark.parametrize("name", REFUSED)
def test_tokenizer_without_an_equivalent_in_llama_cpp_is_refused(name, tmp_path):
    tokenizer, message = REFUSED[name]
    with pytest.raises(TokenizerError, match=f"llama.cpp has no equivalent of it: .*, got {re.escape(message)}"):
        export_gguf(make_kind(vocab_size=320), tmp_path / "m.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_tokens_that_would_be_spelt_alike_are_refused(tmp_path):
    tokenizer = build_tiktoken_tokenizer(make_encoding(special_tokens=("[PAD319]",)))
    with pytest.raises(TokenizerError, match=r"expected different tokens, got '\[PAD319\]' twice"):
        export_gguf(make_kind(vocab_size=320), tmp_path / "m.gguf", tokenizer=tokenizer)

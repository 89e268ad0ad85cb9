"""GGUF files in a real llama.cpp: `make exports` runs this, the default tests skip it.

On a CPU llama.cpp looks the tanh GELU up in a table of float16, so that logits cannot agree better than to about 1e-2
here. TableGELU is that table in torch; with it most of the difference is gone, and what is left are roundings to the
other neighbour, which grow from layer to layer.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, gelu

from hugging_nano_gpt import (
    CharacterTable,
    NanoGPTLMHeadModel,
    build_character_tokenizer,
    build_tiktoken_tokenizer,
    export_gguf,
    export_model,
    read_meta,
)
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH, SAMPLES_PATH

from ..helpers.encodings import make_encoding, make_gpt2_encoding, make_texts
from ..helpers.ggufs import UNICODE, make_kind, read_gelu_note, spoil_tensors
from ..helpers.members import MEMBERS
from ..helpers.tiny import FIXTURES_DIR, compute_logits, make_batch

llama_cpp = pytest.importorskip("llama_cpp")

# Hamlet, act 3, scene 1; in the demo's 65 characters.
TEXT = """HAMLET:
To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles
And by opposing end them. To die, to sleep,
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to: 'tis a consummation
Devoutly to be wish'd. To die, to sleep;
To sleep, perchance to dream: ay, there's the rub;
For in that sleep of death what dreams may come,
When we have shuffled off this mortal coil,
Must give us pause: there's the respect
That makes calamity of so long life.
"""


@contextlib.contextmanager
def open_llama(path, **kwargs):
    """Loads a file with a cache in float32, the model's dtype; llama.cpp's default is float16."""
    settings = {"n_ctx": 0, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0, "n_threads": 2}
    llama = llama_cpp.Llama(os.fspath(path), **settings | kwargs)
    try:
        yield llama
    finally:
        llama.close()


def evaluate(llama, idx: torch.Tensor) -> torch.Tensor:
    """Returns the logits, (B, T, V) for (B, T), row by row."""
    rows = []
    for row in idx.tolist():
        llama.reset()
        llama.eval(row)
        rows.append(np.array(llama.scores[: len(row)]))
    return torch.from_numpy(np.stack(rows))


def export_and_evaluate(model, path, idx, **kwargs) -> torch.Tensor:
    export_gguf(model, path, **kwargs)
    with open_llama(path) as llama:
        return evaluate(llama, idx)


class TableGELU(torch.nn.Module):
    """The GELU of ggml on a CPU (ggml_vec_gelu_f32): tanh, read and written in float16 between -10 and 10."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, looked_up, x.clamp(min=0))


def make_tabled(model) -> NanoGPTLMHeadModel:
    """Makes a copy that computes ggml's GELU."""
    tabled = NanoGPTLMHeadModel(model.config).eval()
    tabled.load_state_dict(model.state_dict())
    for block in tabled.transformer.h:
        block.mlp.act = TableGELU()
    return tabled


def find_difference(left, right) -> float:
    return (left - right).abs().max().item()


IDX = torch.stack([torch.arange(32), torch.arange(64, 0, -2)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
def test_toy_models_compute_the_same(bias, is_tied, tmp_path):
    model = make_kind(bias=bias, is_tied=is_tied)
    found, expected = export_and_evaluate(model, tmp_path / "m.gguf", IDX), compute_logits(model, IDX)
    assert find_difference(found, expected) < 1e-2  # measured: 6.7e-3, of logits up to 11
    assert find_difference(found, compute_logits(make_tabled(model), IDX)) < 2e-3  # 9.6e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("fault", ["swapped", "transposed"])
def test_wrong_tensors_show(fault, tmp_path, monkeypatch):
    model = make_kind()
    spoil_tensors(monkeypatch, fault)
    found = export_and_evaluate(model, tmp_path / "m.gguf", IDX)
    assert find_difference(found, compute_logits(model, IDX)) > 0.1


@pytest.mark.parametrize("name", [*MEMBERS, "llmc/gpt2_tiny_bf16.bin"])
def test_every_fixture_runs(name, tmp_path):
    options = MEMBERS.get(name, ({}, None, None))[0]
    model = export_model(FIXTURES_DIR / name, tmp_path / "m.gguf", to="gguf", **options).model.float()
    idx, _ = make_batch(2, min(16, model.config.block_size), model.config.vocab_size)
    with open_llama(tmp_path / "m.gguf") as llama:
        found = evaluate(llama, idx)
    assert find_difference(found, compute_logits(model, idx)) < 5e-3  # measured: 2.6e-3
    assert find_difference(found, compute_logits(make_tabled(model), idx)) < 1e-3  # 3.2e-4; 6 of them below 2e-5


class Demo:
    """The bundled checkpoint, with the exact GELU that it was trained with and with the tanh one."""

    tokenizer = build_character_tokenizer(read_meta(META_PATH), block_size=128)
    exact = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    tanh = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, activation_function="gelu_new")
    samples = load_file(SAMPLES_PATH)["samples"]


def compute_perplexity(logits: torch.Tensor, idx: torch.Tensor) -> float:
    return cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).exp().item()


# The largest difference of a logit and of the perplexity's logarithm, about twice of what was measured.
TOLERANCES = {"f32": (0.03, 1e-4), "f16": (0.07, 3e-4), "q8_0": (1.2, 0.01)}


@pytest.mark.parametrize("file_type", TOLERANCES)
def test_demo_keeps_its_logits_and_its_perplexity(file_type, tmp_path):
    """On Shakespeare, its training data, and on text that nanoGPT sampled from it."""
    lost = export_gguf(Demo.exact, tmp_path / "m.gguf", tokenizer=Demo.tokenizer, file_type=file_type)
    difference, tolerance = TOLERANCES[file_type]
    for idx in (torch.tensor(Demo.tokenizer(TEXT).input_ids[:512]).view(4, 128), Demo.samples[:, :128]):
        exact, tanh, tabled = (compute_logits(each, idx) for each in (Demo.exact, Demo.tanh, make_tabled(Demo.tanh)))
        with open_llama(tmp_path / "m.gguf") as llama:
            found = evaluate(llama, idx)
        ratio = compute_perplexity(found, idx) / compute_perplexity(exact, idx)
        print(f"{file_type}: logits {find_difference(found, exact):.1e}, perplexity times {ratio:.6f}")
        assert find_difference(found, exact) < difference
        assert abs(np.log(ratio)) < tolerance
        if file_type == "f32":  # the rest of the difference comes from the GELU
            assert find_difference(found, exact) < 3 * read_gelu_note(lost)[1]
            assert find_difference(found, tabled) < find_difference(found, tanh) < find_difference(found, exact)


@pytest.mark.parametrize("file_type", ["f32", "f16"])
def test_demo_writes_the_same_greedy_text(file_type, tmp_path):
    export_gguf(Demo.exact, tmp_path / "m.gguf", tokenizer=Demo.tokenizer, file_type=file_type)
    with open_llama(tmp_path / "m.gguf") as llama:
        found = llama.create_completion("ROMEO:", max_tokens=120, temperature=0)
    assert found["usage"]["completion_tokens"] == 120  # no character ends the text
    idx = torch.tensor([Demo.tokenizer("ROMEO:").input_ids])
    expected = Demo.exact.generate(idx, max_new_tokens=120, do_sample=False)[0, 6:]
    assert found["choices"][0]["text"] == Demo.tokenizer.decode(expected)


def test_characters_are_the_same_tokens_and_the_same_text(tmp_path):
    tokenizer = build_character_tokenizer(CharacterTable(tuple(UNICODE)))
    n = len(UNICODE)
    export_gguf(make_kind(vocab_size=n + 11, n_layer=1), tmp_path / "m.gguf", tokenizer=tokenizer)
    rng = random.Random(0)
    with open_llama(tmp_path / "m.gguf") as llama:
        for _ in range(500):
            text = "".join(rng.choices(UNICODE, k=rng.randint(0, 40)))
            ids = tokenizer(text).input_ids
            for special in (True, False):
                assert llama.tokenize(text.encode(), add_bos=True, special=special) == ids
            assert llama.detokenize(ids) == text.encode()
        assert (llama.n_vocab(), llama.token_bos(), llama.token_eos()) == (n + 11, -1, -1)
        assert llama.tokenize(b"a#c", add_bos=False) == [UNICODE.index("a"), -1, UNICODE.index("c")]
        for unknown in "#\u00e8\u4e00\U0001f600":  # of one to four bytes, beginning like known ones
            ids = llama.tokenize(f"a{unknown}c".encode(), add_bos=False)
            assert ids[0] == UNICODE.index("a")
            assert ids[-1] == UNICODE.index("c")
            with pytest.raises(RuntimeError, match="llama_decode returned -1"):
                llama.eval(ids)


@pytest.mark.parametrize("size", ["small", "gpt2"])
def test_bpe_gives_the_same_tokens_and_the_same_text(size, tmp_path):
    """On random Unicode; the larger one has GPT-2's 50257 tokens, in a model of 50304 rows."""
    encoding = make_encoding(gap=3) if size == "small" else make_gpt2_encoding()
    tokenizer, vocab_size = build_tiktoken_tokenizer(encoding), 320 if size == "small" else 50304
    export_gguf(make_kind(vocab_size=vocab_size, n_layer=1), tmp_path / "m.gguf", tokenizer=tokenizer)
    with open_llama(tmp_path / "m.gguf") as llama:
        assert (llama.n_vocab(), llama.token_eos()) == (vocab_size, encoding.eot_token)
        for text in make_texts(encoding):
            ids = tokenizer(text).input_ids
            assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids
            ordinary = tokenizer(text, split_special_tokens=True).input_ids
            assert llama.tokenize(text.encode(), add_bos=True, special=False) == ordinary
            assert llama.detokenize(ids, special=True) == text.encode()


def test_file_without_a_tokenizer_takes_ids(tmp_path):
    model = make_kind()
    found = export_and_evaluate(model, tmp_path / "m.gguf", IDX)
    assert found.shape == (2, 32, 65)
    with open_llama(tmp_path / "m.gguf", logits_all=False) as llama:
        tokens = [token for token, _ in zip(llama.generate(IDX[0, :8].tolist(), temp=0), range(20), strict=False)]
    expected = model.generate(IDX[:1, :8], max_new_tokens=20, do_sample=False)[0, 8:]
    assert tokens == expected.tolist()


# Each aborts its process, which has little memory and no debugger that ggml could call.
CRASH = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from llama_cpp import Llama
llama = Llama(sys.argv[1], n_ctx=0, n_batch=256, verbose=False)
{first}
print("so far", flush=True)
{then}
print("survived", flush=True)
"""


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ("llama.eval([1] * 32)", "llama.eval([1])", "GGML_ASSERT"),
        ("llama.tokenize('a\xe9#'.encode())", "llama.tokenize('a\xe8'.encode())", "bad_alloc"),
    ],
    ids=["a token too many", "an unknown character"],
)
def test_what_an_export_warns_of_does_happen(first, then, message, tmp_path):
    """When this fails, llama.cpp has improved, and the note can be removed."""
    tokenizer = build_character_tokenizer(CharacterTable(tuple(UNICODE)))
    lost = export_gguf(make_kind(vocab_size=len(UNICODE)), tmp_path / "m.gguf", tokenizer=tokenizer)
    assert any("aborts after 32 of this model" in sentence for sentence in lost)
    assert any("make llama.cpp hang" in sentence and "'0xc3'" in sentence for sentence in lost)
    result = subprocess.run(
        [sys.executable, "-c", CRASH.format(first=first, then=then), tmp_path / "m.gguf"],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout) == (-signal.SIGABRT, "so far\n")
    assert message in result.stderr

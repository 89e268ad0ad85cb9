"""evaluate: every token is scored once, as a plain loop over the reference does; nanoGPT's estimate; errors."""

import io
import json
import math

import numpy as np
import pytest
import torch

from hugging_nano_gpt import (
    DataError,
    TokenizerError,
    build_tiktoken_tokenizer,
    evaluate_loss,
    read_checkpoint,
    read_meta,
)
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.programs import run_command
from ..helpers.reference import ReferenceGPT
from ..helpers.tiny import make_model
from ..helpers.trace import TRACE_DIR
from ..tokenization.test_bpe import make_encoding

TEXT = "KING RICHARD III:\nNow is the winter of our discontent\nMade glorious summer by this sun of York;\n" * 3
BLOCK_SIZE = 128
RUN_PATH = TRACE_DIR / "ckpt_200.pt"  # train.py evaluated it on 5 batches of 8 windows


def load_reference(path):
    checkpoint = read_checkpoint(path)
    reference = ReferenceGPT(**checkpoint.model_args)
    reference.load_state_dict(checkpoint.state_dict)
    return reference.eval()


@torch.no_grad()
def score_with_the_reference(reference, ids, stride):
    """Computes the mean loss of all tokens but the first, one token at a time."""
    block_size = reference.transformer["wpe"].num_embeddings
    losses, end = [], min(block_size, len(ids) - 1)
    scored = range(1, end + 1)
    while scored:
        begin = max(0, end - block_size)
        logprobs = reference(torch.tensor([ids[begin:end]]))[0].double().log_softmax(-1)
        losses += [-logprobs[0, i - begin - 1, ids[i]].item() for i in scored]
        scored = range(end + 1, min(end + stride, len(ids) - 1) + 1)
        end += len(scored)
    assert len(losses) == len(ids) - 1
    return sum(losses) / len(losses)


@pytest.mark.parametrize("stride", [None, 1, 50, BLOCK_SIZE])
def test_every_token_of_a_text_is_scored_once(stride, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    found = evaluate_loss(CKPT_PATH, tmp_path / "text.txt", stride=stride, meta_path=META_PATH)
    ids = read_meta(META_PATH).encode("\n" + TEXT)  # with the newline that sample.py starts with
    expected = score_with_the_reference(load_reference(CKPT_PATH), ids, stride or BLOCK_SIZE)
    assert found.loss == pytest.approx(expected, abs=1e-6)  # float32 logits and losses
    assert (found.n_tokens, found.stride) == (len(TEXT), stride or BLOCK_SIZE)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (found.unit, found.n_units) == ("character", len(TEXT))
    assert found.bits_per_unit == pytest.approx(expected / math.log(2), abs=2e-6)
    assert found.estimate is None


def test_text_shorter_than_a_window_is_scored_whole(tmp_path):
    (tmp_path / "text.txt").write_text("KING")
    found = evaluate_loss(CKPT_PATH, tmp_path / "text.txt", meta_path=META_PATH)
    ids = read_meta(META_PATH).encode("\nKING")
    assert found.n_tokens == 4
    assert found.loss == pytest.approx(score_with_the_reference(load_reference(CKPT_PATH), ids, 1), abs=1e-6)


def test_token_file_and_nanogpts_estimate_of_it():
    found = evaluate_loss(RUN_PATH, TRACE_DIR, stride=20)
    tokens = np.fromfile(TRACE_DIR / "val.bin", dtype=np.uint16).tolist()
    assert found.loss == pytest.approx(score_with_the_reference(load_reference(RUN_PATH), tokens, 20), abs=1e-6)
    assert found.n_tokens == len(tokens) - 1
    state = read_checkpoint(RUN_PATH).training_state
    facts = found.to_json()["estimate"]
    assert (facts["n_windows"], facts["agrees"]) == (40, True)
    assert facts["best_val_loss"] == state.best_val_loss
    assert abs(facts["loss"] - state.best_val_loss) <= facts["tolerance"]
    assert abs(facts["loss"] - found.loss) < 6 * facts["standard_error"]
    assert f"best_val_loss {state.best_val_loss:.4f} agrees" in str(found)


def test_estimate_on_another_file_is_not_compared(tmp_path):
    (tmp_path / "other.bin").write_bytes((TRACE_DIR / "val.bin").read_bytes())
    facts = evaluate_loss(RUN_PATH, tmp_path / "other.bin", eval_iters=2).to_json()["estimate"]
    assert (facts["n_windows"], facts["best_val_loss"], facts["agrees"]) == (16, None, None)


def test_without_a_tokenizer_there_are_no_bits(tmp_path):
    found = evaluate_loss(RUN_PATH, TRACE_DIR / "val.bin", eval_iters=1)
    assert (found.unit, found.bits_per_unit) == (None, None)
    assert any(note.startswith("no bits per byte or character: ") for note in found.notes)
    assert not [name for name in found.to_json() if name.startswith("bits")]


def test_bytes_are_counted_where_tokens_are_more_than_characters(tmp_path):
    tokenizer = build_tiktoken_tokenizer(make_encoding())
    model = make_model(vocab_size=len(tokenizer), n_layer=1)
    model.generation_config.bos_token_id = tokenizer.eos_token_id
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    text = "hello \u20ac world<|endoftext|>hello " * 9
    (tmp_path / "text.txt").write_bytes(text.encode())
    found = evaluate_loss(tmp_path / "saved", tmp_path / "text.txt")
    ids = tokenizer(text).input_ids
    assert (found.unit, found.n_tokens) == ("byte", len(ids))
    assert found.n_units == len(text.replace("<|endoftext|>", "").encode())
    assert found.bits_per_unit == pytest.approx(found.loss * len(ids) / math.log(2) / found.n_units)
    np.array(ids, dtype=np.uint16).tofile(tmp_path / "val.bin")  # its first token is only context
    of_tokens = evaluate_loss(tmp_path / "saved", tmp_path, eval_iters=1)
    assert of_tokens.n_tokens == len(ids) - 1
    assert of_tokens.n_units == len(tokenizer.decode(ids[1:], skip_special_tokens=True).encode())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (b"", TokenizerError, "at least one token"),
        ("R\xd6MEO".encode(), TokenizerError, r"text\.txt: expected characters of the model's 65, got '\xd6'"),
        (b"\xff\xfe", DataError, "expected text in UTF-8"),
        (None, DataError, r"text\.txt: cannot be opened: No such file"),
    ],
    ids=["empty", "unknown", "bytes", "missing"],
)
def test_text_that_cannot_be_read_is_refused(text, error, message, tmp_path):
    if text is not None:
        (tmp_path / "text.txt").write_bytes(text)
    with pytest.raises(error, match=message):
        evaluate_loss(CKPT_PATH, tmp_path / "text.txt", meta_path=META_PATH)


@pytest.mark.parametrize("stride", [0, BLOCK_SIZE + 1])
def test_stride_outside_a_window_is_refused(stride):
    with pytest.raises(DataError, match=rf"stride: expected 1 to block_size={BLOCK_SIZE}, got {stride}"):
        evaluate_loss(CKPT_PATH, "text.txt", stride=stride, meta_path=META_PATH)


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path):
    np.full(500, 65, dtype=np.uint16).tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match="token ids below vocab_size=65, got 65"):
        evaluate_loss(CKPT_PATH, tmp_path, meta_path=META_PATH)


def test_command_prints_for_people_and_as_json(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ("evaluate", CKPT_PATH, tmp_path / "text.txt", "--meta", META_PATH, "--stride", 64)
    expected = evaluate_loss(CKPT_PATH, tmp_path / "text.txt", stride=64, meta_path=META_PATH)
    assert run_command(*arguments) == (0, f"{expected}\n", "")
    result = run_command(*arguments, "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(expected.to_json()))
    assert {"loss", "perplexity", "bits_per_character", "n_tokens", "estimate"} < json.loads(result.stdout).keys()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_command_shows_bars_on_a_terminal_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "StringIO", Terminal)
    shown = run_command("evaluate", RUN_PATH, TRACE_DIR, "--eval-iters", "2")
    assert (shown.returncode, "window/s" in shown.stderr, "batch/s" in shown.stderr) == (0, True, True)
    monkeypatch.undo()
    assert run_command("evaluate", RUN_PATH, TRACE_DIR, "--eval-iters", "2") == (0, shown.stdout, "")

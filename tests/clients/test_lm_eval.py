"""lm-evaluation-harness: its command line on a saved folder, its client of our server, and special tokens.

examples/evaluate.py, which tests/clients/test_examples.py runs, compares every loglikelihood with our own.
"""

import json
import math
import os
import re
import subprocess
import sys

import pytest

from hugging_nano_gpt import NanoGPTLMHeadModel, evaluate_loss
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.folders import ROOT
from ..helpers.serving import serve_app
from ..helpers.tiny import make_tokenizer

pytest.importorskip("lm_eval")

# lm-eval and its many packages warn when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = [json.loads(line)["text"] for line in (ROOT / "examples/evaluate/lines.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model():
    return NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)


def make_harness(model, special_tokens, **settings):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=make_tokenizer(**special_tokens), batch_size=2, **settings)


def request(kind, *cases):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=case, idx=index) for index, case in enumerate(cases)]


def test_command_line_evaluates_a_saved_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "demo")
    make_tokenizer(eos_token="$", pad_token="$").save_pretrained(tmp_path / "demo")
    arguments = f"pretrained={tmp_path / 'demo'},prefix_token_id=0,trust_remote_code=True"
    command = f"-m lm_eval run --model hf --device cpu --model_args {arguments} --tasks demo_text"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    paths = ["--include_path", "examples/evaluate", "--output_path", str(tmp_path / "results.json")]
    command = [sys.executable, *command.split(), *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("results*.json")
    found = json.loads(path.read_text())["results"]["demo_text"]["bits_per_byte,none"]
    assert found == pytest.approx(1.890, abs=5e-4)  # what examples/evaluate.py prints, and computes itself


def test_numbers_over_http_are_those_in_process(model, tmp_path):
    """The client sends token ids, with echo and one new token; its longest window is block_size + 1 tokens long."""
    pytest.importorskip("fastapi")
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    ends = {"eos_token": "$", "pad_token": "$"}
    tokenizer = make_tokenizer(**ends)
    tokenizer.save_pretrained(tmp_path)
    long = "\n".join(TEXTS)  # several windows long
    pairs = [(text[:length], text[length : length + 9]) for text in TEXTS[:4] for length in (0, 5, 40)]
    pairs += [(long[:200], long[200:210]), (long[:200], " zzzz")]
    asked = request("loglikelihood", *pairs), request("loglikelihood_rolling", (long,))
    settings = {"until": ["\n"], "max_gen_toks": 20}
    until = request("generate_until", ("KING", settings), ("ROMEO:\n", settings))
    harness = make_harness(model, ends, prefix_token_id=0)
    with serve_app(model, tokenizer) as address:
        api = LocalCompletionsAPI(
            model="demo",
            base_url=f"{address}/v1/completions",
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
            max_length=model.config.block_size + 2,
            custom_prefix_token_id=0,
            batch_size=3,
            max_retries=1,
        )
        scored, (rolled,) = api.loglikelihood(asked[0]), api.loglikelihood_rolling(asked[1])
        generated = api.generate_until(until)
    expected = harness.loglikelihood(asked[0], disable_tqdm=True)
    assert [value for value, _ in scored] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in scored] == [is_greedy for _, is_greedy in expected]
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    assert rolled == pytest.approx(harness.loglikelihood_rolling(asked[1], disable_tqdm=True)[0], rel=1e-5)
    assert generated == harness.generate_until(until, disable_tqdm=True)


def test_padding_changes_no_number(model):
    harness = make_harness(model, {"eos_token": "$", "pad_token": "$"}, prefix_token_id=0)
    pairs = [(text[:length], text[length : length + 9]) for text in TEXTS for length in (5, 20, 40)]
    together = harness.loglikelihood(request("loglikelihood", *pairs), disable_tqdm=True)
    alone = [harness.loglikelihood(request("loglikelihood", pair), disable_tqdm=True)[0] for pair in pairs]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


def test_tokenizer_without_special_tokens_is_not_enough(model):
    """Why docs/tokenizers.md asks for eos and pad: lm-eval's own errors do not say that they are missing."""
    harness = make_harness(model, {})
    with pytest.raises(TypeError, match="None"):
        harness.loglikelihood(request("loglikelihood", ("", "KING")), disable_tqdm=True)
    with pytest.raises(TypeError, match="None"):
        harness.generate_until(request("generate_until", ("KING", {"until": [";"]})), disable_tqdm=True)


@pytest.mark.parametrize(("end", "expected"), [("$", " RICHARD III:\nThe"), ("\n", " RICHARD III:")])
def test_newline_as_end_cuts_what_is_generated(model, end, expected):
    harness = make_harness(model, {"eos_token": end, "pad_token": end}, prefix_token_id=0)
    settings = {"until": ["\n\n"], "max_gen_toks": 17, "do_sample": False}
    assert harness.generate_until(request("generate_until", ("KING", settings)), disable_tqdm=True) == [expected]


def test_words_of_a_text_are_as_perplexing_as_evaluate_finds(model, tmp_path):
    """Word perplexity is defined as in the wikitext task: exp of the summed loss divided by the number of words."""
    text = "\n".join(TEXTS)
    (tmp_path / "text.txt").write_text(text)
    found = evaluate_loss(CKPT_PATH, tmp_path / "text.txt", meta_path=META_PATH)
    assert found.n_tokens > 2 * model.config.block_size
    harness = make_harness(model, {"eos_token": "$", "pad_token": "$"}, prefix_token_id=0)
    (loglikelihood,) = harness.loglikelihood_rolling(request("loglikelihood_rolling", (text,)), disable_tqdm=True)
    n_words = len(re.split(r"\s+", text))
    perplexity = math.exp(-loglikelihood / n_words)
    assert math.exp(found.loss * found.n_tokens / n_words) == pytest.approx(perplexity, rel=1e-4)

"""examples/chat.py: a base model becomes a chat that answers, stops, is served, and goes back to nanoGPT."""

import importlib
import json
import re
import shlex

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from hugging_nano_gpt import (
    NanoGPTConfig,
    NanoGPTLMHeadModel,
    build_tiktoken_tokenizer,
    convert_to_folder,
    read_checkpoint,
    sample_text,
)

from ..helpers.curl import ask, serving
from ..helpers.folders import ROOT
from ..helpers.programs import run_command
from ..helpers.scripts import link_scripts, run_script, skip_without_nanogpt
from ..helpers.serving import find_port, run_serve

DOC = (ROOT / "docs" / "chat.md").read_text()
QUESTION = [{"role": "user", "content": "Who art thou?"}]
ANSWER = "A small model that has read some Shakespeare."

pytest.importorskip("trl")
# TRL 1.16 uses names that Transformers 5.23 has renamed, with any model.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(ROOT / "examples")
        return importlib.import_module("chat")


@pytest.fixture(scope="module")
def out_dir(example, tmp_path_factory):
    """The folder that the example writes."""
    folder = tmp_path_factory.mktemp("chat")
    results = example.main(folder, n_updates=40)
    assert len(results) == 14
    assert all(results)
    return folder


@pytest.fixture(scope="module")
def chat(out_dir):
    return (
        NanoGPTLMHeadModel.from_pretrained(out_dir / "chat"),
        AutoTokenizer.from_pretrained(out_dir / "chat", trust_remote_code=False),
    )


def test_saved_folder_answers_and_stops(example, chat):
    assert example.answer(*chat, QUESTION) == ANSWER + "<|end|>"


def test_untrained_model_does_not_answer(example):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(example.CKPT_PATH)
    tokenizer = example.build_character_tokenizer(example.read_meta(example.META_PATH), block_size=128)
    example.add_chat(model, tokenizer)
    assert not example.answer(model, tokenizer, QUESTION).startswith(ANSWER[:7])


def test_template_marks_the_answers_with_their_ends(chat):
    messages = [*QUESTION, {"role": "assistant", "content": ANSWER}, *QUESTION]
    tokens = chat[1].apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mask]
    assert chat[1].decode(marked) == ANSWER + "<|end|>"
    whole = f"<|user|>Who art thou?<|end|><|assistant|>{ANSWER}<|end|><|user|>Who art thou?<|end|>"
    assert chat[1].apply_chat_template(messages, tokenize=False) == whole


@pytest.mark.parametrize("n_rows", [259, 320, 1024])
def test_tokens_take_spare_rows_or_added_ones(example, n_rows):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding(
        "mine", pat_str=r" ?\p{L}+|\s+|.", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    tokenizer = build_tiktoken_tokenizer(encoding, block_size=32)
    model = NanoGPTLMHeadModel(NanoGPTConfig(vocab_size=n_rows, n_layer=1, n_head=1, n_embd=8, block_size=32))
    tokens = model.get_input_embeddings().weight[:259].clone()
    example.add_chat(model, tokenizer)
    rows = model.get_input_embeddings().weight
    assert len(rows) == model.config.vocab_size == max(n_rows, 263)
    assert sorted(tokenizer.convert_tokens_to_ids(list(example.STAND_INS))) == [259, 260, 261, 262]
    assert torch.equal(rows[:259], tokens)
    assert torch.equal(rows[259:263], tokens.mean(0).expand(4, -1))
    assert model.generation_config.suppress_tokens == (list(range(263, n_rows)) or None)
    assert tokenizer.bos_token == "<|endoftext|>"


def test_untied_model_gets_both_of_its_matrices(example):
    tokenizer = example.build_character_tokenizer(example.CharacterTable(tuple("abc")))
    config = NanoGPTConfig(vocab_size=3, n_layer=1, n_head=1, n_embd=8, block_size=8, tie_word_embeddings=False)
    model = NanoGPTLMHeadModel(config)
    example.add_chat(model, tokenizer)
    for rows in (model.transformer.wte.weight, model.lm_head.weight):
        assert torch.equal(rows[3:], rows[:3].mean(0).expand(4, -1))
    assert not torch.equal(model.transformer.wte.weight, model.lm_head.weight)


@pytest.mark.filterwarnings("ignore")  # from the packages of the server
@pytest.mark.parametrize("stream", [False, True])
def test_serve_answers_and_stops(out_dir, monkeypatch, stream):
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    port = find_port()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
    with run_serve(["hugging-nano-gpt", "serve", str(out_dir / "chat"), "--port", str(port)], monkeypatch), client:
        answer = client.chat.completions.create(model="chat", messages=QUESTION, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        pieces = [(choice.delta if stream else choice.message).content or "" for choice in choices]
        assert "".join(pieces) == ANSWER
        assert choices[-1].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match="expected the roles user and assistant, got system"):
            client.chat.completions.create(model="chat", messages=[{"role": "system", "content": "Be brief."}])


def test_checkpoint_spells_the_tokens_by_its_meta(out_dir, capsys):
    checkpoint = read_checkpoint(out_dir / "out" / "ckpt.pt")
    assert checkpoint.model_args["vocab_size"] == 69
    assert checkpoint.training_state.config["dataset"] == "chat"
    sample_text(out_dir / "out" / "ckpt.pt", "<Who art thou?|>", num_samples=1, max_new_tokens=60, temperature=0)
    assert capsys.readouterr().out.startswith(f"<Who art thou?|>{ANSWER}|")


@pytest.mark.filterwarnings("ignore")  # from pipelines
def test_folder_made_from_the_checkpoint_chats(out_dir, tmp_path):
    convert_to_folder(out_dir / "out" / "ckpt.pt", tmp_path / "chat-2", tokenizer=str(out_dir / "chat"))
    pipe = pipeline("text-generation", str(tmp_path / "chat-2"), trust_remote_code=True)
    (text,) = pipe(QUESTION, max_new_tokens=60, do_sample=False)
    assert text["generated_text"][-1] == {"role": "assistant", "content": ANSWER}


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_sample_py_reads_it(out_dir, tmp_path):
    link_scripts(tmp_path)
    (tmp_path / "data").symlink_to(out_dir / "data")
    flags = ["--device=cpu", "--num_samples=1", "--max_new_tokens=60", "--top_k=1", "--start=<Who art thou?|>"]
    output = run_script(tmp_path, "sample.py", f"--out_dir={out_dir / 'out'}", *flags)
    assert f"<Who art thou?|>{ANSWER}|" in output


def test_chat_md_python_runs_as_written_and_is_the_examples(example, out_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "out-chat").symlink_to(out_dir)
    monkeypatch.chdir(tmp_path)
    tokens, folder = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    exec(tokens, names := {})
    source = (ROOT / "examples" / "chat.py").read_text()
    constants, function = tokens[tokens.index("USER, ") :].split("\n\n\n")
    assert constants in source
    assert function in source
    assert names["TEMPLATE"] == example.TEMPLATE
    exec(folder, {})
    assert capsys.readouterr().out == f"{ANSWER}<|end|>\n"
    (line,) = re.findall(r"```\n(\{.*)\n```", DOC)
    assert json.loads(line)["messages"][0] == QUESTION[0]


def test_chat_md_commands_run_as_written(out_dir, tmp_path):
    """What is not here is run elsewhere: the example and the server in this file, sample.py where there is nanoGPT."""
    (tmp_path / "out-chat").symlink_to(out_dir)
    lines = [shlex.split(line) for line in re.findall(r"^hugging-nano-gpt .*", DOC, flags=re.MULTILINE)]
    assert [line[1] for line in lines] == ["generate", "serve", "convert"]
    generate, _, convert = (run_command(*line[1:], cwd=tmp_path) if line[1] != "serve" else None for line in lines)
    prompt = "<|user|>Who art thou?<|end|><|assistant|>"
    assert (generate.stdout, generate.stderr) == (f"{prompt}{ANSWER}<|end|>\n---------------\n", "")
    assert convert.stdout.startswith("Wrote chat-2: ")


def test_chat_md_asks_the_server_as_written(out_dir, monkeypatch):
    pytest.importorskip("fastapi")
    (curl,) = re.findall(r"^curl .*?'$", DOC, flags=re.MULTILINE | re.DOTALL)
    port = find_port()
    with serving(["hugging-nano-gpt", "serve", str(out_dir / "chat"), "--port", str(port)], monkeypatch):
        words = shlex.split(curl.replace("\\\n", "").replace("8000", str(port)))
        (choice,) = json.loads(ask(words))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")

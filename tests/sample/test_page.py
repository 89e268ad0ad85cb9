"""The playground without Gradio and a browser: what its page shows and refuses; test_playground.py opens it."""

import re
import shutil
import socket
import sys
from html import unescape

import pytest
from huggingface_hub import constants

import hugging_nano_gpt_cli
from hugging_nano_gpt import MissingDependencyError, ServerError, TokenizerError, convert_to_folder, run_playground
from hugging_nano_gpt.convert.source import Source
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.sample import page
from hugging_nano_gpt.sample import playground as server
from hugging_nano_gpt.sample.markup import draw_bars, draw_facts, draw_text, list_facts
from hugging_nano_gpt.sample.streaming import Candidate, stream_steps

from ..helpers.folders import DOCS_DIR
from ..helpers.samples import FACTS, sample
from ..helpers.serving import find_port
from ..helpers.tiny import make_model

SETTINGS = {"temperature": 0.8, "top_k": 5, "seed": 1337}


def read(markup):
    """Returns the texts of our HTML without its tags."""
    return [unescape(text) for text in re.split(r"<[^>]*>", markup) if text]


@pytest.mark.parametrize(("interval_s", "n_shown"), [(0, 150), (1e9, 2)], ids=["all", "the first and the last"])
def test_page_shows_growing_text_and_ends_with_all_of_it(sampler, monkeypatch, interval_s, n_shown):
    monkeypatch.setattr(page, "_INTERVAL_S", interval_s)
    shown = list(page.show_steps(sampler, "ROMEO:", max_new_tokens=150, **SETTINGS))
    *_, last = stream_steps(sampler, "ROMEO:", max_new_tokens=150, **SETTINGS)
    texts = ["".join(read(text)[1:]) for text, _, _ in shown]
    assert texts[-1] == sampler.tokenizer.decode(last.idx)
    assert len(set(texts)) == len(texts) == n_shown
    assert all(texts[-1].startswith(text) for text in texts)
    assert read(shown[-1][0])[1] == "ROMEO:"  # in its own colour
    assert shown[-1][2].startswith("150 of 150 tokens, ")
    assert len(read(shown[-1][1])) == 1 + 2 * 5  # a heading, and for each of top_k tokens its name and its share


def test_empty_prompt_is_a_newline(sampler):
    *_, (text, _, _) = page.show_steps(sampler, "", max_new_tokens=20, **SETTINGS)
    *_, last = stream_steps(sampler, "\n", max_new_tokens=20, **SETTINGS)
    assert "".join(read(text)[1:]) == sampler.tokenizer.decode(last.idx)


def test_unknown_character_is_refused_before_anything_is_shown(sampler):
    with pytest.raises(TokenizerError, match="leave them out"):
        next(page.show_steps(sampler, "caf\xe9", max_new_tokens=20, **SETTINGS))


def test_leaving_the_page_stops_the_model(sampler):
    shown = page.show_steps(sampler, "", max_new_tokens=1_000_000, **SETTINGS)
    next(shown)
    shown.close()
    assert len(list(stream_steps(sampler, max_new_tokens=3))) == 3  # it waits for its turn


def test_texts_are_escaped():
    nasty = "<script>alert('&amp;')</script>"
    escaped = "&lt;script&gt;alert(&#x27;&amp;amp;&#x27;)&lt;/script&gt;"
    for markup in (
        draw_facts({"model": nasty}),
        draw_text(nasty, nasty + "!"),
        draw_text("", nasty),
        draw_bars([Candidate(nasty, 1.0, True)]),
    ):
        assert escaped in markup
        assert "<script" not in markup


def test_bars_are_as_long_as_the_tokens_are_likely():
    markup = draw_bars([Candidate("a", 0.75, False), Candidate("b", 0.25, True), Candidate("c", 1e-7, False)])
    assert re.findall(r"width: ([\d.]+)%", markup) == ["75.00", "25.00", "0.00"]
    assert read(markup)[1:] == ["a", "75.00%", "b", "25.00%", "c", "< 0.01%"]
    assert re.findall(r'class="token( drawn)?"', markup) == ["", " drawn", ""]


@pytest.fixture
def served(monkeypatch):
    """Records what run_playground would serve, without Gradio."""
    calls = []
    monkeypatch.setattr(server, "require", lambda *_: None)
    monkeypatch.setattr(server, "build_page", lambda sampler, facts: (sampler, facts))
    monkeypatch.setattr(server, "_serve", lambda page, port: calls.append((*page, port)))
    return calls


def test_playground_without_a_source_shows_the_bundled_model(served):
    run_playground(port=find_port())
    ((sampler, facts, _),) = served
    assert facts == FACTS
    assert read(draw_facts(facts)) == [part for item in FACTS.items() for part in item]
    assert sampler.tokenizer.decode([0, 1]) == "\n "


def test_facts_of_a_folder_and_of_the_hub_are_those_of_its_model(served, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--shakespeare" / "snapshots" / "0123"
    convert_to_folder(CKPT_PATH, snapshot, meta_path=META_PATH)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source in (snapshot, "someone/shakespeare"):
        run_playground(source, port=find_port())
    assert [facts for _, facts, _ in served] == [
        {**FACTS, "model": "0123", "kind": "folder of Transformers"},
        {**FACTS, "model": "someone/shakespeare", "kind": "model of the Hub"},
    ]


def test_facts_before_the_first_evaluation_say_so():
    facts = list_facts(Source("ckpt.pt", "nanoGPT checkpoint", make_model()))
    assert (facts["iteration"], facts["validation loss"], facts["biases"]) == ("0", "not measured", "yes")


def test_playground_uses_the_options_of_the_command(served, tmp_path):
    shutil.copy(CKPT_PATH, tmp_path / "mine.pt")
    run_playground(
        tmp_path / "mine.pt", port=find_port(), meta_path=META_PATH, dtype="bfloat16", activation_function="gelu_new"
    )
    ((sampler, facts, _),) = served
    changed = {
        "model": "mine.pt",
        "activation": "tanh GELU, nanoGPT's before June 2023",
        "computes on": "cpu, bfloat16",
    }
    assert facts == {**FACTS, **changed}
    assert sampler.model.config.activation_function == "gelu_new"


def test_playground_without_gradio_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gradio>=6\.24'$"):
        run_playground("missing.pt")


def test_playground_refuses_a_port_that_is_taken(served):
    with socket.socket() as listener:
        listener.bind((server.HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=rf"^127.0.0.1:{port}: cannot be listened on: .*; give another port"):
            run_playground("missing.pt", port=port)
    assert served == []


def test_playground_md_commands_and_python_run_as_written(served, tmp_path, monkeypatch):
    for source, place in ((CKPT_PATH, "out-shakespeare-char/ckpt.pt"), (META_PATH, "data/shakespeare_char/meta.pkl")):
        (tmp_path / place).parent.mkdir(parents=True)
        shutil.copy(source, tmp_path / place)
    monkeypatch.chdir(tmp_path)
    # it would silence later tests
    monkeypatch.setattr(hugging_nano_gpt_cli.program, "set_up_transformers", lambda **_: None)
    doc = (DOCS_DIR / "playground.md").read_text()
    commands = re.findall(r"^(?:ssh .* )?hugging-nano-gpt (playground .*)$", doc, re.M)
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["hugging-nano-gpt", *command.split(), "--port", str(find_port())])
        with pytest.raises(SystemExit, match=r"^0$"):
            hugging_nano_gpt_cli.main()
    assert [facts for _, facts, _ in served] == [FACTS, FACTS]
    (block,) = re.findall(r"```python\n(.*?)```", doc, flags=re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert names["text"] == sample("out-shakespeare-char/ckpt.pt", "ROMEO:", max_new_tokens=100, top_k=5)
    assert names["likeliest"].probability > 0.2  # of five

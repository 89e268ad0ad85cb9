"""From a text to a served model with five commands and no Python: prepare, train, evaluate, convert, serve."""

import json
import socket
import urllib.request

import pytest

from ..helpers.pipeline import make_folder, run
from ..helpers.serving import run_in_thread
from ..helpers.texts import make_text

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of fastapi, uvicorn and their dependencies


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_five_commands_go_from_a_text_to_a_served_model(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text(make_text(2000), newline="")
    make_folder(tokenizer)
    servers, serve = [], uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: servers.append(server))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    run("serve", "model", "--port", port)
    with run_in_thread(servers[0], serve):
        answer = ask(port, {"model": "model", "prompt": "the king", "max_tokens": 5})
    assert answer["usage"]["completion_tokens"] == 5


def ask(port, question):
    """Sends a request as the README's curl line does."""
    address, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(address, json.dumps(question).encode(), headers), timeout=60) as answer:
        return json.loads(answer.read())

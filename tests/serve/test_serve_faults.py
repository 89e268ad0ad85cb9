"""serve: which requests are refused and how, who may ask, what is logged, and how the server is started."""

import os
import re
import socket
from pathlib import Path

import pytest

from hugging_nano_gpt import MissingDependencyError, ServerError, run_server
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.serve import server as module

from ..helpers.folders import DOCS_DIR
from ..helpers.programs import run_command
from ..helpers.serving import PROMPT, ask_app, complete, connect, draw, find_port, run_in_thread, serve_app
from ..helpers.tiny import make_tokenizer

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")  # openai is built on it

# Warnings of fastapi, uvicorn and their dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

SERVING_MD = DOCS_DIR / "serving.md"


def post(client, path="completions", **body):
    """Sends what OpenAI's client would not send; returns the raw response."""
    return httpx.post(f"{client.base_url}{path}", json={"prompt": PROMPT, **body}, timeout=60)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "R\xd6MEO"}, "prompt", "prompt: expected characters of the model's 65, got '\xd6'; leave them"),
        ({"prompt": ""}, "prompt", "prompt: expected at least one token, got none"),
        ({"prompt": []}, "prompt", "prompt: expected token ids of 0 to 64, got none"),
        ({"prompt": [[]]}, "prompt", "prompt: expected token ids of 0 to 64, got none"),
        ({"prompt": [1, 65, -1]}, "prompt", "prompt: expected token ids of 0 to 64, got 65, -1"),
        ({"prompt": [True]}, "prompt", "prompt: expected a text, a list of texts, token ids, or a list of lists"),
        ({"prompt": ["a", 1]}, "prompt", "prompt: expected a text, a list of texts, token ids, or a list of lists"),
        ({"prompt": None}, "prompt", "prompt: expected a text, a list of texts"),
        ({"prompt": "a" * 5000}, "prompt", "prompt: expected at most 4096 tokens, got 5000 characters; shorten it"),
        ({"prompt": [1] * 5000}, "prompt", "prompt: expected at most 4096 tokens, got 5000; shorten it"),
        ({"prompt": ["a" * 4000] * 20}, "prompt", "prompt: expected at most 65536 tokens, got more in all prompts"),
        (
            {"prompt": [1] * 130, "echo": True, "logprobs": 0},
            "prompt",
            "at most block_size + 1 = 129 tokens with echo",
        ),
        ({"max_tokens": -1}, "max_tokens", "max_tokens: expected greater than or equal to 0, got -1"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: expected a valid integer, got 1.5"),
        (
            {"max_tokens": 10_000_000},
            "max_tokens",
            "max_tokens: expected at most 4096 in all answers together, got 1 x",
        ),
        (
            {"max_tokens": 2000, "n": 3},
            "max_tokens",
            "max_tokens: expected at most 4096 in all answers together, got 3 x 2000",
        ),
        ({"n": 5000}, "max_tokens", "max_tokens: expected at most 4096 in all answers together, got 5000 x 0"),
        ({"temperature": -1}, "temperature", "temperature: expected greater than or equal to 0, got -1"),
        ({"temperature": "hot"}, "temperature", "temperature: expected a valid number, got 'hot'"),
        ({"top_p": 0}, "top_p", "top_p: expected greater than 0"),
        ({"top_p": 1.5}, "top_p", "top_p: expected less than or equal to 1, got 1.5"),
        ({"top_k": -1}, "top_k", "top_k: expected greater than or equal to 0, got -1"),
        ({"seed": True}, "seed", "seed: expected a valid integer, got True"),
        ({"seed": 2**63}, "seed", "seed: expected less than 9223372036854775808"),
        (
            {"stop": ["a", ""]},
            "stop",
            "stop: expected a text or up to 16 of them, of 1 to 256 characters each, got ''",
        ),
        ({"stride": 129}, "stride", "stride: expected 1 to block_size=128, got 129"),
        ({"logprobs": 6}, "logprobs", "logprobs: expected less than or equal to 5, got 6"),
        ({"best_of": 2}, "best_of", "best_of: is not supported: expected none, got 2"),
        ({"suffix": "end"}, "suffix", "suffix: is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty: is not supported"),
        ({"num_beams": 2}, "num_beams", "num_beams: is not known here; leave it out"),
        ({"padding": True}, "padding", "padding: is not known here"),
        ({"model": "gpt-4"}, "model", "model: expected 'demo', which is served here, got 'gpt-4'"),
        (
            {"stream_options": {"include_usage": 1}},
            "stream_options",
            "stream_options: expected a valid boolean, got 1",
        ),
        ({"model": 4}, "model", "model: expected a valid string, got 4"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_request_that_cannot_be_answered_is_refused(client, body, param, message):
    for stream in (False, True):
        answer = post(client, stream=stream, **body)
        error = answer.json()["error"]
        assert answer.status_code == (404 if body.get("model") == "gpt-4" else 400)
        assert message in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "R", "temperature": NaN}', "NaN is not a number in JSON"),
        (b'{"prompt": "R", "temperature": 1e999}', "temperature: expected a finite number, got inf"),
        (b'{"prompt": "R", "seed": ' + b"1" * 5000 + b"}", "body: expected JSON in UTF-8"),
        (b'{"prompt": "\xff"}', "body: expected JSON in UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b'["prompt"]', "body: expected an object in JSON, got ['prompt']"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "body: expected a flat object"),
        (b"", "body: expected JSON in UTF-8"),
    ],
    ids=["nan", "inf", "digits", "utf-8", "surrogate", "name", "list", "deep", "empty"],
)
def test_body_that_is_no_request_is_refused(client, body, message):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{client.base_url}completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_body_without_the_content_type_of_json_is_refused(client):
    """Otherwise any web page could make a browser send it."""
    answer = httpx.post(f"{client.base_url}completions", content=b'{"prompt": "R"}')
    assert (answer.status_code, "Content-Type: application/json" in answer.text) == (400, True)


def test_model_and_paths_that_do_not_exist_are_not_found(client):
    with pytest.raises(openai.NotFoundError, match="model: expected 'demo', which is served here, got 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    with pytest.raises(openai.NotFoundError, match="got 'gpt-4'") as caught:
        client.models.retrieve("gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: Not Found"):
        client.embeddings.create(model="demo", input="x")
    assert httpx.get(f"{client.base_url}completions").status_code == 405
    assert [demo.id for demo in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_key_is_required_everywhere_except_for_health(demo):
    with serve_app(demo, make_tokenizer(), api_key="s\xe9same") as address:
        for key in ("none", "s\xe9sam"):
            answer = httpx.post(
                f"{address}/v1/completions", json={}, headers={"Authorization": f"Bearer {key}".encode()}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        headers = {"Authorization": "Bearer s\xe9same".encode()}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
    with serve_app(demo, make_tokenizer(), api_key="sesame") as address:
        with connect(address, api_key="sesame") as client:
            assert complete(client, max_tokens=1).choices
        with connect(address) as client, pytest.raises(openai.AuthenticationError, match="key: expected the server's"):
            complete(client)


@pytest.mark.parametrize(("allowed", "expected"), [(None, None), ("http://page.test", "http://page.test")])
def test_web_pages_need_an_allowed_origin(demo, allowed, expected):
    with serve_app(demo, make_tokenizer(), allow_origin=allowed, api_key="sesame") as address:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, found in (("http://page.test", expected), ("http://other.test", None)):
            answer = httpx.options(f"{address}/v1/completions", headers={"Origin": origin, **asked})
            assert answer.headers.get("access-control-allow-origin") == found
            assert (answer.status_code == 200) == (found is not None)


def test_log_has_a_line_for_each_request(demo, capfd):
    with serve_app(demo, make_tokenizer(), quiet=False) as address, connect(address) as client:
        complete(client, max_tokens=5)
        list(complete(client, max_tokens=4, stream=True))
        httpx.get(f"{address}/a%0Ab\u20ac")
    lines = capfd.readouterr().err.splitlines()
    begin, end = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", r", \d+\.\d{3} s"
    assert re.fullmatch(f"{begin}POST /v1/completions 200, 6 tokens in, 5 out{end}", lines[0])
    assert re.fullmatch(f"{begin}POST /v1/completions 200, 6 tokens in, 4 out{end}", lines[1])
    assert re.fullmatch(f"{begin}GET /a%0Ab%E2%82%AC 404{end}", lines[2])
    assert len(lines) == 3


def test_quiet_server_logs_nothing(demo, capfd):
    with serve_app(demo, make_tokenizer()) as address, connect(address) as client:
        complete(client, max_tokens=5)
    assert capfd.readouterr().err == ""


def test_serving_md_python_runs_as_written(demo, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", SERVING_MD.read_text(), flags=re.DOTALL)
    with serve_app(demo, make_tokenizer(), "shakespeare") as address:
        exec(block.replace("http://127.0.0.1:8000", address), {})
    settings = {"max_new_tokens": 200, "do_sample": True, "temperature": 0.8, "top_k": 200}
    assert capsys.readouterr().out == draw(demo, make_tokenizer(), PROMPT, seed=1337, **settings)[0]


def test_serving_md_has_at_most_600_words():
    assert len(SERVING_MD.read_text().split()) <= 600


def test_serving_md_names_every_field_of_a_request():
    from hugging_nano_gpt.serve import request

    text = SERVING_MD.read_text()
    names = {*request.CompletionRequest.model_fields, *request.ChatRequest.model_fields, *request._NEUTRAL}
    assert [name for name in sorted(names | {"max_completion_tokens"}) if f"`{name}`" not in text] == []


def test_nothing_of_transformers_own_server_is_imported():
    paths = Path(module.__file__).parents[1].rglob("*.py")
    assert [path.name for path in paths if "transformers.cli" in path.read_text()] == []


def test_run_server_refuses_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=rf"^127.0.0.1:{port}: cannot be listened on: "):
            run_server("missing.pt", port=port)


@pytest.fixture
def ipv6_port():
    """A free port of ::1."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            return listener.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")


def test_ipv6_address_is_checked_printed_as_a_url_and_listened_on(demo, monkeypatch, tmp_path, capsys, ipv6_port):
    demo.save_pretrained(tmp_path / "demo")
    make_tokenizer().save_pretrained(tmp_path / "demo")
    found = []

    def ask_and_end(server):
        with run_in_thread(server, run):
            url = re.search(r"http://[^;]+", capsys.readouterr().out)[0]
            found.append(httpx.get(f"{url}/models", timeout=60).json()["data"][0]["id"])

    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", ask_and_end)
    run_server(tmp_path / "demo", host="::1", port=ipv6_port, quiet=True)
    assert found == ["demo"]
    with (
        socket.create_server(("::1", ipv6_port), family=socket.AF_INET6),
        pytest.raises(ServerError, match=rf"^\[::1\]:{ipv6_port}: cannot be listened on: "),
    ):
        run_server("missing.pt", host="::1", port=ipv6_port)


def test_run_server_refuses_an_empty_key():
    """ "$KEY" is empty if KEY is not set; then everyone would have access."""
    with pytest.raises(ServerError, match="--api-key: expected some text, got none"):
        run_server("missing.pt", api_key="")


@pytest.mark.parametrize(
    ("host", "key", "is_warned"), [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "sesame", False)]
)
def test_command_loads_names_serves_and_warns(monkeypatch, tmp_path, host, key, is_warned):
    configs = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: configs.append(server.config))
    if key is not None:
        monkeypatch.setitem(os.environ, "HUGGING_NANO_GPT_API_KEY", key)
    folder = tmp_path / "out-demo"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(CKPT_PATH.read_bytes())
    port = find_port()
    done = run_command("serve", folder / "ckpt.pt", "--host", host, "--port", port, "--meta", META_PATH)
    assert (done.returncode, done.stdout) == (0, f"out-demo is served at http://{host}:{port}/v1; Ctrl-C ends it\n")
    (config,) = configs
    assert (config.app.title, config.host, config.port) == ("out-demo", host, port)
    assert done.stderr == (
        f"warning: everyone who reaches {host}:{port} can use it; --api-key asks for a key\n" * is_warned
    )
    answer = ask_app(config.app, prompt=PROMPT)
    assert ("error" in answer) == (key is not None)


def test_run_server_without_its_packages_names_them(monkeypatch):
    monkeypatch.setattr("hugging_nano_gpt.errors.find_spec", lambda package: None)
    with pytest.raises(MissingDependencyError, match=r"pip install fastapi uvicorn"):
        run_server(CKPT_PATH)

"""serve in public: many clients, slow ones, clients that disconnect, random bodies, and a shutdown that is quick."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.folders import ROOT
from ..helpers.serving import CHAT_TEMPLATE, PROMPT, complete, connect, draw, find_port, serve_app
from ..helpers.tiny import make_model, make_tokenizer

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")  # openai is built on it

# Warnings of fastapi, uvicorn and their dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

ENDLESS = 10**8  # tokens, which take hours
SOON_S = 10  # far less than that; a busy machine needs 1 s


@pytest.fixture(scope="module")
def parts():
    return make_model(), make_tokenizer()


@pytest.fixture(scope="module")
def address(parts):
    """A server with endless answers and a queue of two requests."""
    with serve_app(*parts, queue=2, max_tokens=ENDLESS) as address:
        yield address


@pytest.fixture
def client(address):
    with connect(address, timeout=SOON_S) as client:
        yield client
        address.wait_for_jobs(0)


def test_twenty_clients_at_once_get_what_each_gets_alone(parts):
    def ask(number):
        with connect(address) as client:
            settings = {"max_tokens": 20 + number, "seed": number, "stream": number % 2 == 0}
            answer = complete(client, **settings)
            return "".join(part.choices[0].text for part in (answer if settings["stream"] else [answer]))

    with serve_app(*parts) as address, concurrent.futures.ThreadPoolExecutor(20) as threads:
        texts = list(threads.map(ask, range(20)))
    drawing = {"do_sample": True, "top_k": 0}
    assert texts == [draw(*parts, PROMPT, seed=n, max_new_tokens=20 + n, **drawing)[0] for n in range(20)]


def test_three_hundred_requests_need_no_more_memory(client):
    def ask(number):
        stream = number % 3 == 0
        settings = {"max_tokens": 4, "n": 2, "seed": number, "logprobs": 2, "echo": number % 2 == 0}
        answer = complete(client, stream=stream, **settings)
        assert sum(len(part.choices) for part in (answer if stream else [answer])) >= 2

    for number in range(50):
        ask(number)
    before = read_memory()
    for number in range(300):
        ask(number)
    growth = read_memory() - before
    print(f"300 requests: {growth / 2**20:.2f} MiB more")
    assert growth < 8 * 2**20


def read_memory():
    """Returns the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def send(address, body, path="/v1/completions"):
    """Sends a request and does not read the answer."""
    content = json.dumps({"prompt": "RO", **body}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.settimeout(SOON_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not read stays with the server
        connection.connect((host, int(port)))
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0])
        )  # closed by a reset
        connection.sendall(head.encode() + content)
        yield connection


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_disconnect_waiting_or_answered_end_their_work(client, address, stream):
    body = {"max_tokens": ENDLESS, "stream": stream}
    with send(address, body), send(address, body), send(address, body):
        address.wait_for_jobs(3)
    address.wait_for_jobs(0)
    assert complete(client, max_tokens=5).usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_is_killed_ends_its_work(client, address, stream):
    script = f"import openai; client = openai.OpenAI(base_url={address + '/v1'!r}, api_key='none')\n"
    script += f"answer = client.completions.create(model='demo', prompt='RO', max_tokens={ENDLESS}, stream={stream})\n"
    script += "for part in answer: print(part.choices[0].text, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    address.wait_for_jobs(1)
    process.kill()
    process.communicate()
    address.wait_for_jobs(0)
    assert complete(client, max_tokens=5).usage.completion_tokens == 5


def test_client_that_disconnects_in_the_middle_of_its_request_is_forgotten(client, address):
    host, port = address.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            connection.sendall(b'Content-Length: 90\r\n\r\n{"prompt"')
    assert complete(client, max_tokens=5).usage.completion_tokens == 5


def test_slow_readers_do_not_delay_others(client, address):
    """Three of them would fill the queue of two if each kept its place until its answer is read."""
    body = {"prompt": "x" * 300_000, "max_tokens": 0, "echo": True, "n": 20, "stream": True}  # 6 MB each
    with contextlib.ExitStack() as readers:
        for _ in range(3):
            assert readers.enter_context(send(address, body)).recv(1) == b"H"  # it is being answered, or waits
        address.wait_for_jobs(0)
        assert complete(client, max_tokens=5).usage.completion_tokens == 5


def test_body_that_does_not_arrive_times_out(address, monkeypatch):
    from hugging_nano_gpt.serve import app

    monkeypatch.setattr(app, "_PATIENCE_S", 0.2)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SOON_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        connection.sendall(b'Content-Length: 90\r\n\r\n{"prompt"')
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_full_queue_refuses_and_says_when_to_retry(client, address):
    body = {"max_tokens": ENDLESS}
    with send(address, body), send(address, body), send(address, body):
        address.wait_for_jobs(3)
        with pytest.raises(openai.InternalServerError, match="server: 2 requests wait already; try again") as caught:
            complete(client)
    assert (caught.value.status_code, caught.value.response.headers["Retry-After"]) == (503, "1")


def test_health_answers_at_once_while_the_server_is_busy(parts):
    bodies = [{"prompt": "x" * 1_000_000}, {"prompt": [1] * 300_000}, {"prompt": "x" * 10_000_000}]
    with (
        serve_app(*parts) as address,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
        contextlib.ExitStack() as busy,
    ):
        for _ in range(20):
            busy.enter_context(send(address, {"max_tokens": 4096, "stream": True}))
        answers, times = [threads.submit(post, address, bodies[number % 3]) for number in range(24)], []
        while not all(answer.done() for answer in answers) or len(times) < 20:
            begin = time.monotonic()
            assert httpx.get(f"{address}/health", timeout=SOON_S).status_code == 200
            times.append(time.monotonic() - begin)
        assert [answer.result().status_code for answer in answers] == [400, 400, 413] * 8
    assert max(times) < 1


def post(address, body):
    return httpx.post(f"{address}/v1/completions", json=body, timeout=60)


def test_body_of_more_than_a_mebibyte_is_refused_in_chunks_too(address):
    def list_chunks():
        for _ in range(20):
            yield b" " * 100_000

    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{address}/v1/completions", content=list_chunks(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    with (
        connect(address) as client,
        pytest.raises(openai.APIStatusError, match="body: expected at most 1048576 bytes"),
    ):
        complete(client, "x" * 10_000_000)


def test_end_of_a_server_closes_its_streams(parts):
    """Each stream says what happened and ends; requests without a stream and waiting ones get an error."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.ExitStack())
        address = server.enter_context(serve_app(*parts, max_tokens=ENDLESS))
        stream = stack.enter_context(send(address, {"max_tokens": ENDLESS, "stream": True}))
        stream.recv(1000)
        whole = stack.enter_context(send(address, {"max_tokens": ENDLESS}))
        waiting = stack.enter_context(send(address, {"max_tokens": ENDLESS, "stream": True}))
        address.wait_for_jobs(3)
        begin = time.monotonic()
        server.close()
        assert time.monotonic() - begin < 3
        text = read_rest(stream)
        assert "server: it is being ended; try again later" in text
        assert text.endswith("data: [DONE]\n\n\r\n0\r\n\r\n")
        assert read_rest(whole).startswith("HTTP/1.1 503 ")
        assert read_rest(waiting).endswith("data: [DONE]\n\n\r\n0\r\n\r\n")


def test_end_of_a_server_does_not_wait_for_a_reader_that_does_not_read(parts, capfd):
    with contextlib.ExitStack() as server, contextlib.ExitStack() as readers:
        address = server.enter_context(serve_app(*parts, max_tokens=ENDLESS))
        body = {"prompt": "x" * 300_000, "max_tokens": 0, "echo": True, "n": 20, "stream": True}
        assert readers.enter_context(send(address, body)).recv(1) == b"H"
        address.wait_for_jobs(0)
        begin = time.monotonic()
        server.close()
        assert 1 < time.monotonic() - begin < 3  # the reader is given a second
    assert capfd.readouterr().err == ""


def read_rest(connection):
    return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


@contextlib.contextmanager
def start_command(port):
    command = [sys.executable, "-m", "hugging_nano_gpt", "serve", CKPT_PATH, "--meta", META_PATH]
    command += ["--port", str(port), "--max-tokens", str(ENDLESS)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_command_ends_at_a_signal():
    codes = {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 0}
    ports = {sign: find_port() for sign in codes}
    with contextlib.ExitStack() as stack:
        processes = {sign: stack.enter_context(start_command(ports[sign])) for sign in codes}
        for sign, process in processes.items():
            address = f"http://127.0.0.1:{ports[sign]}"
            assert process.stdout.readline() == f"demo is served at {address}/v1; Ctrl-C ends it\n"
            with connect(address, max_retries=20) as client:
                stream = complete(client, max_tokens=ENDLESS, stream=True)
                next(stream)
                begin = time.monotonic()
                process.send_signal(sign)
                with pytest.raises(openai.APIError, match="server: it is being ended"):
                    list(stream)
                assert time.monotonic() - begin < 2
            assert process.wait(SOON_S) == codes[sign]  # Python and torch need a second to exit
            lines = process.stderr.read().splitlines()  # torchao, if it is installed, writes some too
            (line,) = [line for line in lines if " POST " in line]
            assert " /v1/completions 200, 6 tokens in, " in line
            assert not any("Traceback" in line for line in lines)


GOOD = {"prompt": "RO", "max_tokens": 3}
GOOD_CHAT = {"messages": [{"role": "user", "content": "RO"}], "max_tokens": 3}
NAMES = (
    "prompt messages model max_tokens max_completion_tokens n seed stop stream stream_options temperature top_p top_k "
    "min_p repetition_penalty stride echo logprobs top_logprobs chat_template_kwargs best_of suffix tools user other"
).split()
VALUES = json.loads(
    """[null, true, false, 0, 1, -1, 2, 1.0, 0.5, 1e-30, 1e-320, 1e308, NaN, Infinity, -0.0, 2147483648,
    9223372036854775808, -9223372036854775808, 1000000000000000000000, "", "RO", "\\u00d6", "\\ud800", "\\u0000",
    "{{ 1/0 }}", [], {}, ["RO"], [1, 2], [[1, 2], [3]], [[]], [null], ["RO", 1], [64], [65], {"include_usage": true},
    {"mood": "x"}, {"mood": {"a": [1]}}, {"padding": true},
    [{"role": "user", "content": "RO"}], [{"role": 1, "content": 2}], [{"role": "user", "content": ["RO"]}],
    [{"role": "user", "content": "RO", "x": {}}]]"""
)


def make_bodies(n_bodies):
    """Makes random bodies: values of all types in all fields, and bytes that are not JSON."""
    rng = random.Random(1337)
    for _ in range(n_bodies):
        path, good = rng.choice([("completions", GOOD), ("chat/completions", GOOD_CHAT)])
        body = {**good, **{rng.choice(NAMES): rng.choice(VALUES) for _ in range(rng.randrange(4))}}
        content = json.dumps(body).encode()
        if rng.random() < 0.05:
            depth = rng.choice([10, 300, 900, 3000])
            deep = rng.choice([b"[", b'{"a":']) * depth + b"1" + rng.choice([b"]", b"}"]) * depth
            content = json.dumps({**body, rng.choice(NAMES): "DEEP"}).encode().replace(b'"DEEP"', deep)
        if rng.random() < 0.1:
            place = rng.randrange(len(content))
            content = content[:place] + rng.randbytes(rng.randrange(4)) + content[place + rng.randrange(3) :]
        yield path, content


def test_five_thousand_random_bodies_never_fail(parts):
    from hugging_nano_gpt.serve.app import build_app

    model, tokenizer = parts[0], make_tokenizer(chat_template=CHAT_TEMPLATE)
    app = build_app(model, tokenizer, "demo", max_tokens=64, quiet=True)
    headers = {"Content-Type": "application/json"}

    async def ask_all():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x/v1", timeout=SOON_S) as client:

            async def ask(path, content):
                answer = await client.post(path, content=content, headers=headers)
                return path, content, answer.status_code, answer.text

            waiting, answers = set(), []
            for body in make_bodies(5000):
                waiting.add(asyncio.create_task(ask(*body)))
                if len(waiting) == 8:
                    done, waiting = await asyncio.wait(waiting, timeout=SOON_S, return_when=asyncio.FIRST_COMPLETED)
                    answers += [task.result() for task in done]
            answers += await asyncio.gather(*waiting)
            return answers, (await client.post("completions", json={**GOOD, "max_tokens": 20})).json()

    answers, last = asyncio.run(ask_all())
    assert len(answers) == 5000
    strange = [answer for answer in answers if answer[2] not in (200, 400, 404) or "server_error" in answer[3]]
    assert strange == []
    statuses = [status for _, _, status, _ in answers]
    assert statuses.count(200) > 500
    assert statuses.count(400) > 1500
    expected = draw(model, tokenizer, "RO", max_new_tokens=20, do_sample=False)[0]
    assert last["choices"][0]["text"] == expected

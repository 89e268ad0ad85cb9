"""The README followed line by line in a folder that is not the clone; it stays short, and so do the pages of docs/.

Its commands run in this process, or as the program that README_PROGRAM names: make readme installs the wheel for that.
nanoGPT's part is the bundled checkpoint; where NANOGPT_DIR names a checkout, the line that needs it runs too.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hugging_nano_gpt import read_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from .programs import run_command, run_program
from .scripts import NANOGPT_DIR

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
(BLOCK,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
(SESSION,) = re.findall(r"```\n(python train\.py.*?)```", README, flags=re.DOTALL)
LINES = [words for line in SESSION.replace("\\\n", "").splitlines() if (words := shlex.split(line, comments=True))]
PROGRAM = os.environ.get("README_PROGRAM")
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """What nanoGPT's checkout holds after the first line of the session."""
    for folder in ("out", "out-shakespeare-char"):
        (tmp_path / folder).mkdir()
        shutil.copy(CKPT_PATH, tmp_path / folder / "ckpt.pt")
    data_dir = tmp_path / "data" / "shakespeare_char"
    data_dir.mkdir(parents=True)
    shutil.copy(META_PATH, data_dir / "meta.pkl")
    np.random.default_rng(0).integers(0, 65, 1000, dtype=np.uint16).tofile(data_dir / "val.bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words, *options):
    arguments = [*words[1:], *options]
    result = run_program(Path(PROGRAM).absolute(), *arguments) if PROGRAM else run_command(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_readme_python_runs_as_written(workplace):
    exec(BLOCK, {})
    assert (workplace / "out-back" / "ckpt.pt").is_file()


def test_readme_session_runs_line_by_line(workplace):
    shorter = {"generate": ("--num-samples", "1", "--max-new-tokens", "20"), "evaluate": ("--eval-iters", "1")}
    ran = {}
    for words in LINES:
        if words[0] != "hugging-nano-gpt" or words[1] == "serve" or ("--nanogpt" in words and not NANOGPT_DIR):
            continue
        if "--nanogpt" in words:
            (workplace / "model.py").symlink_to(Path(NANOGPT_DIR) / "model.py")
        ran[words[1]] = run(words, *shorter.get(words[1], ()))
    assert list(ran) == ["inspect", "evaluate", "convert", "verify", "generate", "back"]
    assert "bits per character" in ran["evaluate"]
    assert ran["convert"].startswith("Wrote shakespeare: 350,976 parameters, float32, and a tokenizer of 65 tokens")
    assert "ROMEO:" in ran["generate"]
    assert read_checkpoint("out-back/ckpt.pt").training_state.iter_num == 5000


@pytest.mark.filterwarnings("ignore")  # of the packages underneath
@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_readme_serves_and_asks_as_written(workplace, monkeypatch):
    run(["hugging-nano-gpt", "convert", "out-shakespeare-char/ckpt.pt", "shakespeare"])
    (serve,) = (words for words in LINES if words[:2] == ["hugging-nano-gpt", "serve"])
    (curl,) = (words for words in LINES if words[0] == "curl")
    port = find_port()
    with serving([*serve, "--port", str(port)], monkeypatch):
        command = [word.replace("8000", str(port)) for word in curl]
        retry = ["--silent", "--noproxy", "*", "--retry", "60", "--retry-delay", "1", "--retry-connrefused"]
        done = subprocess.run([*command, *retry], capture_output=True, text=True, check=True, timeout=120)
    answer = json.loads(done.stdout)
    assert (answer["model"], answer["usage"]["completion_tokens"]) == ("shakespeare", 200)


def find_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(words, monkeypatch):
    if PROGRAM:
        with subprocess.Popen([Path(PROGRAM).absolute(), *words[1:]]) as process:
            try:
                yield
            finally:
                process.terminate()
        return
    pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    servers = []

    def start(app, **settings):
        server = uvicorn.Server(uvicorn.Config(app, **settings))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)

    monkeypatch.setattr(uvicorn, "run", start)
    run(words)
    ((server, thread),) = servers
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def test_readme_shows_both_commands():
    assert "make demo" in README
    assert "make test" in README


def test_readme_has_at_most_800_words_and_a_page_1200():
    assert len(README.split()) <= 800
    long = {page.name for page in PAGES if len(page.read_text().split()) > 1200}
    assert long <= {"benchmarks.md", "cli.md", "training.md"}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_contributing_names_existing_files():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    assert len(names) >= 8
    missing = [
        name for name in names if not (ROOT / name).exists() and not (ROOT / "hugging_nano_gpt" / name).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", ["converting.md"])
def test_page_runs_as_written(page, workplace):
    text = (ROOT / "docs" / page).read_text()
    for line in re.search(r"```\n(.*?)```", text, flags=re.DOTALL).group(1).splitlines():
        run(shlex.split(line, comments=True))
    shutil.rmtree("out-back")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, {})
    assert read_checkpoint("out-back/ckpt.pt").training_state.optimizer.moments

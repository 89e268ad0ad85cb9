"""Runs the README line by line in a folder outside the clone, and checks the length and links of all pages.

The commands run in this process. If README_PROGRAM names a program, as in make readme, they run as that program in its
venv, and the pip lines run too. nanoGPT's part is the bundled checkpoint, or nanoGPT itself if NANOGPT_DIR names a
checkout.
"""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

from hugging_nano_gpt import read_checkpoint, read_meta
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.curl import PROGRAM, ask, serving
from ..helpers.folders import ROOT
from ..helpers.programs import run_command, run_program
from ..helpers.scripts import NANOGPT_DIR, link_scripts, run_script
from ..helpers.serving import find_port

README = (ROOT / "README.md").read_text()
(BLOCK,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
(SESSION,) = re.findall(r"```\n(hugging-nano-gpt prepare.*?)```", README, flags=re.DOTALL)
(INSTALL,) = re.findall(r"```\n(pip install.*?)```", README, flags=re.DOTALL)
PAGES = sorted((ROOT / "docs").glob("*.md"))

# Options that make each command take seconds; the model has the size of the bundled one.
SHORTER = {
    "evaluate": "--eval-iters 1",
    "generate": "--num-samples 1 --max-new-tokens 20",
    "train.py": "--device=cpu --dtype=float32 --compile=False --n_layer=3 --n_head=3 --n_embd=96 --block_size=128 "
    "--batch_size=2 --eval_iters=1 --eval_interval=2 --always_save_checkpoint=True",  # on random data it may not fall
}


def split(block):
    lines = block.replace("\\\n", "").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


LINES = split(SESSION)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a text, and the files that nanoGPT's checkout has after the first two lines of the session."""
    for folder in ("out", "out-shakespeare-char"):
        (tmp_path / folder).mkdir()
        shutil.copy(CKPT_PATH, tmp_path / folder / "ckpt.pt")
    data_dir = tmp_path / "data" / "shakespeare_char"
    data_dir.mkdir(parents=True)
    shutil.copy(META_PATH, data_dir / "meta.pkl")
    for split_name in ("train", "val"):
        np.random.default_rng(0).integers(0, 65, 1000, dtype=np.uint16).tofile(data_dir / f"{split_name}.bin")
    characters = read_meta(META_PATH).characters
    text = "".join(np.random.default_rng(0).choice(characters, 9935)) + "".join(characters)
    (tmp_path / "input.txt").write_text(text)
    if NANOGPT_DIR:
        link_scripts(tmp_path)
        (tmp_path / "config").symlink_to(Path(NANOGPT_DIR) / "config")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def _install():
    if PROGRAM:
        for words in split(INSTALL):
            run_pip(words)


def run_pip(words):
    python = PROGRAM.with_name("python")
    subprocess.run([python, "-m", *words, "--quiet"], cwd=ROOT, check=True)


def run(words, *options):
    arguments = [*words[1:], *options]
    result = run_program(PROGRAM, *arguments) if PROGRAM else run_command(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_readme_python_runs_as_written(workplace):
    exec(BLOCK, {})
    assert (workplace / "out-back" / "ckpt.pt").is_file()


def test_readme_session_runs_line_by_line(workplace):
    printed, n_updates = {}, 0
    shutil.rmtree(workplace / "data")  # the first line makes it
    for words in LINES:
        options = SHORTER.get(words[1], "").split()
        if words[0] == "pip" and PROGRAM:
            run_pip(words)
        elif words[0] == "python" and NANOGPT_DIR:
            n_updates += 2
            run_script(workplace, *words[1:], *options, f"--max_iters={n_updates}")
        elif words[0] == "hugging-nano-gpt" and words[1] != "serve" and (NANOGPT_DIR or "--nanogpt" not in words):
            printed[words[1]] = run(words, *options)
    assert list(printed) == ["prepare", "inspect", "evaluate", "convert", "verify", "generate", "back"]
    assert "vocab size: 65\ntrain has 9,000 tokens\nval has 1,000 tokens\n" in printed["prepare"]
    assert "bits per character" in printed["evaluate"]
    assert printed["convert"].startswith(
        "Wrote shakespeare: 350,976 parameters, float32, and a tokenizer of 65 tokens"
    )
    assert "ROMEO:" in printed["generate"]
    assert read_checkpoint("out-back/ckpt.pt").training_state.iter_num == (4 if NANOGPT_DIR else 5000)


@pytest.mark.filterwarnings("ignore")  # warnings of fastapi, uvicorn and their dependencies
def test_readme_serves_and_asks_as_written(workplace, monkeypatch):
    run(["hugging-nano-gpt", "convert", "out-shakespeare-char/ckpt.pt", "shakespeare"])
    for words in LINES:
        if words[0] == "pip" and PROGRAM:
            run_pip(words)
    (serve,) = (words for words in LINES if words[:2] == ["hugging-nano-gpt", "serve"])
    (curl,) = (words for words in LINES if words[0] == "curl")
    port = find_port()
    with serving([*serve, "--port", str(port)], monkeypatch):
        answer = json.loads(ask([word.replace("8000", str(port)) for word in curl]))
    assert (answer["model"], answer["usage"]["completion_tokens"]) == ("shakespeare", 200)
    assert len(answer["choices"][0]["text"].split()) > 20  # words, and not the spaces of a greedy small model


def test_readme_shows_both_commands():
    assert "make demo" in README
    assert "make test" in README


def test_readme_has_at_most_800_words_and_a_page_1200():
    assert len(README.split()) <= 800
    long = {page.name for page in PAGES if len(page.read_text().split()) > 1200}
    assert long <= {"benchmarks.md", "cli.md"}


def list_links(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    return [page.parent / link for link in links if "://" not in link]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page):
    assert not [path for path in list_links(page) if not path.exists()]


def test_links_lead_to_files_of_the_source_distribution():
    """Links have to work in the source distribution, because the project has no web address to link to."""
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]
    targets = {
        path.resolve().relative_to(ROOT).parts[0] for page in (ROOT / "README.md", *PAGES) for path in list_links(page)
    }
    assert "docs" in targets
    assert targets <= {*packed["only-include"], "README.md", "LICENSE"}


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

"""The files that comments, docs and the Makefile name exist, and the Makefile's commands are well-formed."""

import re
import shutil
import subprocess

import pytest

from ..helpers.folders import ROOT

PARTS = ("hugging_nano_gpt", "tests", "benchmarks", "examples", "docs", ".ci", ".github")
NAME = re.compile(r"(?<![\w/.*-])(?:(?:tests|benchmarks|examples)/[\w./-]+|test_\w+)\.(?:py|sh)\b")
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()


def list_texts():
    """Lists the text files of the repository, without the fixtures and without a test that makes up names."""
    suffixes = {".py", ".md", ".sh", ".txt", ".yml", ""}
    paths = [path for part in PARTS for path in (ROOT / part).rglob("*") if path.is_file() and path.suffix in suffixes]
    paths += [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("*.t*"), ROOT / "Makefile"]
    skipped = (ROOT / "tests" / "fixtures", ROOT / "tests" / "test_relied_on.py")
    return [path for path in paths if not any(path.is_relative_to(each) for each in skipped)]


def test_files_that_are_named_exist():
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    named = {(path, name) for path in list_texts() for name in NAME.findall(path.read_text())}
    missing = [(path.name, name) for path, name in named if name not in tests and not (ROOT / name).exists()]
    assert missing == []
    assert len(named) > 50


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_commands_of_the_makefile_are_well_formed(target):
    """Also finds commands that were joined or wrapped: a line is one command, with at most one python -m."""
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert printed.returncode == 0, printed.stderr
    subprocess.run(["sh", "-n"], input=printed.stdout, text=True, check=True)
    commands = printed.stdout.splitlines()
    assert [command for command in commands if command.startswith(("-", ">", "tests/"))] == []
    assert [command for command in commands if command.count("python -m ") > 1] == []

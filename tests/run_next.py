"""Tests what the package relies on in the torch and Transformers that are installed, and prints one table: make next.

Run: python -m tests.run_next requirements          prints what to install next to them
     python -m tests.run_next tests/model/test_cache.py   runs these tests; the exit status is 1 if anything broke
"""

import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from . import relied_on
from .helpers.folders import ROOT

NEWEST = ("torch", "transformers")  # installed first, without the bounds of the range


class Row(NamedTuple):
    """A line of the table."""

    broken: str  # a dotted name, or a test and the number of others that fail in the same way
    how: str
    names: str  # names of relied_on.py in the failure


def list_requirements() -> list[str]:
    """Returns the requirements of the package and its tests, except those installed as the newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [each for each in needed if re.match(r"[\w-]+", each).group() not in NEWEST]


def run_tests(files: list[str]) -> list[tuple[str, str]]:
    """Runs tests in a new process; returns the name and the output of each that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = (
            *"-n 2 --dist loadfile --tb short --override-ini junit_family=xunit1 --junitxml".split(),
            str(report),
        )
        done = subprocess.run([sys.executable, "-m", "pytest", *command, *files], cwd=ROOT, check=False)
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        failed = [(case, fault) for case in cases for fault in case if fault.tag in ("failure", "error")]
    if done.returncode != 0 and not failed:
        return [("pytest", f"ended with exit status {done.returncode}; its output is above")]
    return [(f"{case.get('file')}::{case.get('name')}", fault.text or "") for case, fault in failed]


def make_table(changes: dict[str, str], failures: list[tuple[str, str]]) -> list[Row]:
    """Returns a row for each name that changed, and one for all tests that fail with the same message."""
    rows = [Row(name, how, name.rpartition(".")[2]) for name, how in changes.items()]
    reported = {name for row in rows for name in row.names.split("|")}
    reported |= {name for name in relied_on.list_names() if name.startswith("_")}
    alike: dict[str, list[tuple[str, str]]] = {}
    for test, text in failures:
        alike.setdefault(_find_message(text), []).append((test, text))
    for how, tests in alike.items():
        words = {word for _, text in tests for word in re.findall(r"\w+", text)}
        others = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
        rows.append(Row(tests[0][0] + others, how, ", ".join(sorted(reported & words)) or "-"))
    return rows


def print_table(rows: list[Row]) -> None:
    """Prints the table, or that it is empty."""
    versions = ", ".join(f"{name} {version(name)}" for name in NEWEST)
    print(f"\nPython {platform.python_version()}, {versions}: {len(rows) or 'nothing'} broken\n")
    for row in rows and [Row("what broke", "how", "names of tests/relied_on.py"), Row("---", "---", "---"), *rows]:
        print(f"| {row.broken} | {row.how} | {row.names} |")


def main(arguments: list[str]) -> int:
    """Runs the command; the first lines of this file describe it."""
    if arguments == ["requirements"]:
        print("\n".join(list_requirements()))
        return 0
    rows = make_table(relied_on.find_changes(), run_tests(arguments))
    print_table(rows)
    return int(bool(rows))


def _find_message(text: str) -> str:
    """Returns the first line of an error in a short traceback of pytest's."""
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E ")]
    return (lines or text.splitlines() or [""])[0].replace("|", "/")[:200]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

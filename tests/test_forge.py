""".github: its workflows and issue forms ask for commands that exist, on the Pythons that pyproject.toml names."""

import re
import tomllib

import pytest
import yaml

from .helpers.folders import ROOT
from .helpers.programs import run_command

FORGE_DIR = ROOT / ".github"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (FORGE_DIR / "workflows").glob("*.yml")}

pytestmark = pytest.mark.skipif(not FORGE_DIR.exists(), reason="a source distribution has no .github")


def list_commands(workflow):
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_workflows_ask_for_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z ]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    names = {name for line in targets for name in line.split()}
    asked = [
        line.split()[1] for flow in WORKFLOWS.values() for line in list_commands(flow) if line.startswith("make ")
    ]
    assert set(asked) == {"check", "test", "newest", "next"}
    assert set(asked) <= names


def test_workflow_runs_every_python_that_is_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert named
    assert set(named) <= set(WORKFLOWS["tests"]["jobs"]["linux"]["strategy"]["matrix"]["python"])


def test_issue_forms_ask_for_commands_that_exist():
    text = (FORGE_DIR / "ISSUE_TEMPLATE" / "fault.yml").read_text()
    assert "`hugging-nano-gpt --version --verbose`" in text
    for command, option in (("inspect", "--json"), ("verify", "--nanogpt")):
        assert f"`hugging-nano-gpt {command} {option} " in text
        assert option in run_command(command, "--help").stdout

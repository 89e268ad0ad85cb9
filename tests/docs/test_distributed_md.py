"""docs/distributed.md: torchrun, accelerate and our command accept its command lines."""

import re
import shlex

import pytest
from torch.distributed.run import get_args_parser

from ..helpers.folders import DOCS_DIR
from ..helpers.programs import run_command

PAGE = (DOCS_DIR / "distributed.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", PAGE, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if "hugging-nano-gpt" in line]


def test_page_has_its_lines():
    assert [line.split()[0] for line in LINES] == ["torchrun", "torchrun", "torchrun", "accelerate", "srun"]


@pytest.mark.parametrize("line", [line for line in LINES if "torchrun" in line])
def test_line_is_one_of_torchruns(line):
    _, launch = line.split("torchrun ", 1)
    options = get_args_parser().parse_args(shlex.split(launch))
    assert (options.no_python, options.training_script) == (True, "hugging-nano-gpt")
    assert options.standalone or (options.nnodes, options.rdzv_backend) == ("2", "c10d")


def test_line_of_accelerate_is_one_of_accelerates():
    (line,) = (line for line in LINES if line.startswith("accelerate"))
    launch = pytest.importorskip("accelerate.commands.launch")
    options = launch.launch_command_parser().parse_args(shlex.split(line)[2:])
    assert (options.no_python, options.training_script) == (True, "hugging-nano-gpt")


@pytest.mark.parametrize("line", LINES)
def test_line_is_one_of_ours(line, tmp_path):
    """An unknown flag would exit with 2. Here only the config file is missing."""
    _, ours = line.split("hugging-nano-gpt ", 1)
    result = run_command(*shlex.split(ours), cwd=tmp_path)
    assert result.returncode == 1
    assert re.match(r"error: config/train_gpt2\.py: cannot be read", result.stderr)

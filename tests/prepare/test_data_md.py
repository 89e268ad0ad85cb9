"""docs/data.md: its commands run as written, with a text, documents and a small data set instead of OpenWebText."""

import re
import shlex
from pathlib import Path

import pytest

from ..helpers.folders import list_files
from ..helpers.programs import run_command

DATA_MD = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
(BLOCK,) = re.findall(r"```\n(hugging-nano-gpt.*?)```", DATA_MD, re.DOTALL)


@pytest.mark.usefixtures("text_path", "gpt2")
def test_commands_run_as_written(documents_path, tmp_path, monkeypatch):
    import datasets

    loaded = datasets.load_dataset("json", data_files=str(documents_path))
    load_dataset, asked = datasets.load_dataset, []
    monkeypatch.chdir(tmp_path)

    def load(name, *args, **kwargs):
        if name != "Skylion007/openwebtext":
            return load_dataset(name, *args, **kwargs)
        asked.append(args)
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load)
    for line in BLOCK.splitlines():
        words = shlex.split(line)[1:]
        result = run_command(*words, "--force")
        assert result.returncode == 0, result.stderr
        assert {"train.bin", "val.bin"} < set(list_files(tmp_path / words[2]))
    assert asked == [(None,)]


def test_page_has_at_most_600_words_and_begins_with_prepare():
    assert len(DATA_MD.split()) <= 600
    assert DATA_MD.index("hugging-nano-gpt prepare") < DATA_MD.index("TokenDataset")

"""inspect --json prints valid JSON for any contents of a checkpoint."""

import json
import math

import pytest
import torch

from hugging_nano_gpt import convert_to_folder, inspect_path
from hugging_nano_gpt_cli import commands

from ..helpers.contents import save

ODD = {
    "lr": math.inf,
    "loss": math.nan,
    "lower": -math.inf,
    "dtype": torch.float16,
    "raw": b"\x00",
    "ids": {1},
    3: (1, 2j),
}


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan, 1.5, 1e9])
@pytest.mark.parametrize("as_folder", [False, True])
def test_every_loss_is_told_and_is_json(contents, tmp_path, capsys, loss, as_folder):
    path = save({**contents, "best_val_loss": loss, "config": {"a": loss}}, tmp_path)
    if as_folder:
        convert_to_folder(path, tmp_path / "out")
        path = tmp_path / "out"
    assert "validation loss" in str(inspect_path(path))
    commands.inspect(path, as_json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=refuse_constant)
    expected = None if loss == 1e9 else loss if math.isfinite(loss) else repr(loss)
    if not (as_folder and loss == math.inf):  # above nanoGPT's 1e9, as before the first evaluation
        assert found["best_val_loss"] in (expected, None)
    if not as_folder:
        assert found["config"]["a"] == (loss if math.isfinite(loss) else repr(loss))


def test_every_setting_is_json(contents, tmp_path):
    found = inspect_path(save({**contents, "config": ODD}, tmp_path)).to_json()["config"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["lr"], found["loss"], found["dtype"]) == ("inf", "nan", "torch.float16")

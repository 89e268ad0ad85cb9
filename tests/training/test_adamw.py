"""AdamW's settings that nanoGPT does not set are kept, as when train.py resumes; other optimizers are refused."""

import copy

import pytest
import torch

from hugging_nano_gpt import ConversionError, NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.training import make_optimizer, read_optimizer

from ..helpers.comparison import assert_same
from ..helpers.contents import save
from ..helpers.tiny import make_batch, make_model


def update(model, optimizer, n_updates):
    for number in range(n_updates):
        idx, targets = make_batch(2, 16, seed=number)
        model(idx, shift_labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def make_plain_adamw(model, first=None, second=None):
    """Makes AdamW over nanoGPT's two groups, each with its own settings."""
    groups = [[p for p in model.parameters() if (p.ndim >= 2) is is_decayed] for is_decayed in (True, False)]
    settings = ({"weight_decay": 0.1, **(first or {})}, {"weight_decay": 0.0, **(second or first or {})})
    return torch.optim.AdamW(
        [{"params": group, **own} for group, own in zip(groups, settings, strict=True)], lr=1e-2, betas=(0.9, 0.95)
    )


SETTINGS = {
    "amsgrad": ({"amsgrad": True}, None),
    "amsgrad of the vectors": ({}, {"amsgrad": True}),
    "maximize": ({"maximize": True}, None),
    "eps and betas of the vectors": ({}, {"eps": 1e-2, "betas": (0.5, 0.8)}),
    "weight decay of the vectors": ({}, {"weight_decay": 0.3}),
    "fused": ({"fused": True}, None),
    "foreach": ({"foreach": True}, None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_checkpoints_adamw_are_kept_to_the_bit_of_train_pys_resume(contents, tmp_path, name):
    model = make_model().train()
    optimizer = make_plain_adamw(model, *SETTINGS[name])
    contents["model"] = copy.deepcopy(update(model, optimizer, 3))
    contents["optimizer"] = copy.deepcopy(optimizer.state_dict())
    path = save(contents, tmp_path)

    resumed = make_plain_adamw(model)  # as train.py creates it, before it loads the state
    resumed.load_state_dict(contents["optimizer"])
    expected = update(model, resumed, 6)

    ours = NanoGPTLMHeadModel.from_nanogpt_ckpt(path).train()
    optimizer = make_optimizer(ours, state=read_checkpoint(path).training_state.optimizer)
    assert_same(update(ours, optimizer, 6), expected)

    ours.to_nanogpt_ckpt(path, optimizer=read_optimizer(optimizer, ours), overwrite=True)
    written = torch.load(path, weights_only=True)["optimizer"]
    assert_same(written["state"], resumed.state_dict()["state"])
    assert written["param_groups"] == resumed.state_dict()["param_groups"]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "foreach"])  # the same bits here
def test_settings_of_a_checkpoints_adamw_that_are_dropped_end_elsewhere(name):
    """Shows that the test above can fail."""
    model, other = make_model().train(), make_model().train()
    dropped = update(other, make_plain_adamw(other), 3)
    found = update(model, make_plain_adamw(model, *SETTINGS[name]), 3)
    assert not all(torch.equal(found[name], tensor) for name, tensor in dropped.items())


class Subclass(torch.optim.AdamW):
    """An optimizer that could compute anything."""


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.RAdam, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {"decoupled_weight_decay": True}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (Subclass, {}),
    ],
)
@pytest.mark.parametrize("n_updates", [0, 1])
def test_optimizer_of_another_kind_is_refused_by_name(optimizer_class, settings, n_updates):
    model = make_model().train()
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **settings)
    update(model, optimizer, n_updates)
    name = rf"got .*\.{optimizer_class.__name__}, which computes other updates; write"
    with pytest.raises(ConversionError, match=f"expected torch.optim.AdamW, as nanoGPT has, {name}"):
        read_optimizer(optimizer, model)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}], ids=str)
def test_adam_that_computes_what_adamw_does_is_accepted(settings):
    if settings and "decoupled_weight_decay" not in torch.optim.Adam([torch.ones(1)]).param_groups[0]:
        pytest.skip("Adam of torch 2.6 has no decoupled_weight_decay")
    ends = []
    for kind, own in (
        (torch.optim.Adam, settings),
        (torch.optim.AdamW, {"weight_decay": settings.get("weight_decay", 0)}),
    ):
        model = make_model().train()
        optimizer = kind(model.parameters(), lr=1e-3, **own)
        update(model, optimizer, 3)
        ends.append((model.state_dict(), read_optimizer(optimizer, model).moments))
    for found, expected in zip(*ends, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("name", ["betas", "eps", "weight_decay", "amsgrad", "maximize"])
def test_optimizer_with_several_settings_in_one_of_nanogpts_groups_is_refused(name):
    model = make_model()
    first, *others = model.parameters()
    values = {"betas": (0.5, 0.5), "eps": 1e-3, "weight_decay": 0.5, "amsgrad": True, "maximize": True}
    optimizer = torch.optim.AdamW([{"params": [first], name: values[name]}, {"params": others}])
    with pytest.raises(ConversionError, match=f"expected one value for all matrices .* got more of '{name}'; write"):
        read_optimizer(optimizer, model)

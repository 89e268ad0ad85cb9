"""What makes generate() fast on a CPU: few-row kernels and caches with room, both gone when it returns."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hugging_nano_gpt.model.generation_nano_gpt import RoomyLayer, _apply_linear, _use_decoding_kernels

from .tiny import make_batch, make_model

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def is_changed(model):
    return any("forward" in vars(module) for module in model.modules())


def spy_on_kernels(model):
    """Returns a list that grows by one (module, is_changed) with each forward pass of a Linear."""
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, *_: seen.append("forward" in vars(module)))
    return seen


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_kernels_are_used_while_generating_and_gone_afterwards(settings):
    model = make_model()
    seen = spy_on_kernels(model)
    model.generate(make_batch(1, 4)[0], max_new_tokens=4, **settings)
    assert len(seen) > 0
    assert all(seen)
    assert not is_changed(model)


def test_kernels_stay_nanogpts_without_a_cache_and_outside_of_generate():
    model = make_model()
    seen = spy_on_kernels(model)
    model.generate(make_batch(1, 4)[0], max_new_tokens=4, use_cache=False)
    model(make_batch(1, 4)[0])
    assert len(seen) > 0
    assert not any(seen)


def test_kernels_are_gone_after_an_error():
    model = make_model()
    seen = spy_on_kernels(model)
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[65]]), max_new_tokens=4)
    model.transformer.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(make_batch(1, 4)[0], max_new_tokens=4)
    assert len(seen) > 0
    assert all(seen)
    assert not is_changed(model)


def test_wrapped_modules_are_left_alone():
    class Wrapped(nn.Linear):
        pass

    model = make_model()
    model.transformer.h[0].mlp.c_fc = Wrapped(32, 128)
    hooked = model.transformer.h[1].mlp.c_fc
    hooked.forward = own_forward = lambda inputs: nn.Linear.forward(hooked, inputs)
    with _use_decoding_kernels(model):
        assert "forward" not in vars(model.transformer.h[0].mlp.c_fc)
        assert hooked.forward is own_forward
        with _use_decoding_kernels(model):  # an assistant that is the model itself
            pass
        assert "forward" in vars(model.lm_head)
    assert hooked.forward is own_forward


@pytest.mark.parametrize(
    "compile_part",
    [
        lambda model: setattr(model, "forward", torch.compile(model.forward)),
        lambda model: model.compile(),
        lambda model: model.transformer.h[0].compile(),
        lambda model: setattr(model, "transformer", torch.compile(model.transformer)),
    ],
    ids=["forward", "model", "block", "base model"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported
def test_compiled_models_are_left_alone(compile_part):
    model = make_model()
    compile_part(model)
    with _use_decoding_kernels(model):
        assert "forward" not in vars(model.lm_head)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # the switch reads and sets a flag of Intel GPUs too
def test_kernels_can_be_switched_off_with_torchs_own_switch():
    model = make_model()
    with torch.backends.mkldnn.flags(enabled=False), _use_decoding_kernels(model):
        assert not is_changed(model)


def apply_and_count(linear, inputs):
    """Returns what a Linear computes while generating, and how often it calls the kernel."""
    calls = []

    def kernel(*args):
        calls.append(args)
        return torch.ops.mkldnn._linear_pointwise.default(*args)

    with torch.no_grad():
        return _apply_linear(linear, kernel, inputs), len(calls)


def make_linear(bias, rows, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(256, 3000, bias=bias).to(dtype)
    nn.init.normal_(linear.weight)
    return linear, torch.randn(2, rows, 256, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "rows", "n_calls", "tolerance"),
    # Sums of 256 products of size 1: float32 in another order; float16 rounds the result, of size up to 60.
    [
        *[(torch.float32, rows, 1, 1e-4) for rows in (1, 2, 8, 16)],
        *[(torch.float16, rows, 2, 0.04) for rows in (4, 8, 40)],  # the 3000 outputs in pieces of 2048
    ],
)
def test_kernel_equals_linear(bias, dtype, rows, n_calls, tolerance):
    linear, inputs = make_linear(bias, rows, dtype)
    with torch.no_grad():
        expected = nn.functional.linear(inputs.double(), linear.weight.double())
        expected = expected + (linear.bias.double() if bias else 0)
    found, found_calls = apply_and_count(linear, inputs)
    assert found_calls == n_calls
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (torch.float32, 17),  # 34 rows in all
        (torch.float16, 3),
        *[(dtype, rows) for dtype in (torch.bfloat16, torch.float64) for rows in (1, 4, 40)],
    ],
)
def test_where_the_kernel_gains_nothing_linear_is_torchs_own(bias, dtype, rows):
    linear, inputs = make_linear(bias, rows, dtype)
    found, n_calls = apply_and_count(linear, inputs)
    assert n_calls == 0
    assert torch.equal(found, nn.functional.linear(inputs, linear.weight, linear.bias))


def test_gradients_flow_where_someone_asks_for_them():
    model = make_model()
    with _use_decoding_kernels(model), torch.enable_grad():
        model(make_batch(1, 4)[0]).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_attends_in_float32(dtype):
    model = make_model().to(dtype)
    idx, _ = make_batch(2, 6)
    output = model.generate(idx, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert output.logits[0].dtype == torch.float32
    assert all(layer.keys.dtype == torch.float32 for layer in output.past_key_values.layers)
    uncached = model.generate(idx, max_new_tokens=1, do_sample=False, use_cache=False)
    assert torch.equal(output.sequences[:, :7], uncached)


def make_states(batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 2, length, 4, generator=generator) for _ in range(2))


def test_roomy_layer_equals_a_dynamic_one():
    """Through everything that generation modes do to a cache, at the capacity and beyond it."""
    roomy, plain = DynamicCache(), DynamicCache()
    roomy.layers = [RoomyLayer(max_length=9)]
    actions = [
        ("append", 5),
        ("append", 1),
        ("crop", -2),
        ("append", 1),
        ("reorder", torch.tensor([1, 0, 0])),
        ("append", 1),
        ("copy", None),
        ("append", 2),
        ("crop", -3),
        ("append", 4),
        ("repeat", 2),
        ("append", 3),
        ("select", torch.tensor([0, 5, 3])),
        ("append", 1),
        ("crop", -12),
        ("append", 2),
    ]
    for step, (action, value) in enumerate(actions):
        results = []
        for cache in (roomy, plain):
            if action == "append":
                batch = len(cache.layers[0].keys) if cache.get_seq_length() else 3
                results.append(cache.update(*make_states(batch, value, step), 0))
            elif action == "crop":
                cache.crop(value)
            elif action == "reorder":
                cache.reorder_cache(value)
            elif action == "repeat":
                cache.batch_repeat_interleave(value)
            elif action == "select":
                cache.batch_select_indices(value)
        if action == "copy":
            kept, roomy = roomy, copy.deepcopy(roomy)
        assert roomy.get_seq_length() == plain.get_seq_length(), (step, action)
        for ours, theirs in zip(*results, strict=True) if results else ():
            assert torch.equal(ours, theirs), (step, action)
    assert kept.get_seq_length() == 6  # the copy went its own way


def test_roomy_layer_copies_old_tokens_rarely():
    layer = RoomyLayer(max_length=1000)
    addresses = set()
    for step in range(1000):
        keys, _ = layer.update(*make_states(1, 1, step))
        addresses.add(keys.data_ptr())
    assert keys.shape == (1, 2, 1000, 4)
    assert len(layer._buffers[0][0, 0]) == 1000
    assert len(addresses) <= 11

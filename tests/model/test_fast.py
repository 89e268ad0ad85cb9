"""The fast path of generate: the step equals forward, faster products in its thread, and preallocated caches."""

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hugging_nano_gpt.model import fast_nano_gpt as fast
from hugging_nano_gpt.model.fast_nano_gpt import PreallocatedLayer
from hugging_nano_gpt.model.inputs_nano_gpt import CACHE_NAME

from ..helpers.tiny import make_batch, make_model, pad_left

linear = nn.functional.linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Logits of size 20. float32 sums in another order; a plain cache keeps bfloat16 and float16.
    [(torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.5), (torch.float16, 0.06)],
)
@pytest.mark.parametrize("is_tied", [True, False])
def test_step_equals_forward(bias, activation, is_padded, dtype, tolerance, is_tied):
    model = make_model(bias=bias)
    model.config.activation_function = activation
    model = type(model)(model.config)
    model.load_state_dict(make_model(bias=bias).state_dict())
    if not is_tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
    model = model.to(dtype).eval()
    n_rows = 2 if is_padded else 1
    step = model.bind_step(n_rows)
    ids, mask = pad_left((12, 5)[:n_rows])
    plain = DynamicCache(config=model.config)
    preallocated = DynamicCache()
    preallocated.layers = [PreallocatedLayer(12) for _ in range(2)]
    with torch.no_grad():
        for cache in (plain, preallocated):
            model(ids[:, :8], attention_mask=mask[:, :8], cache=cache)
        for end in range(9, 13):
            positions = mask[:, :end].sum(-1) - 1 if is_padded else end - 1
            key_mask = mask[:, None, None, :end] != 0 if is_padded else None
            expected = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], cache=plain).logits[:, 0]
            found = step(ids[:, end - 1], positions, preallocated.layers, key_mask)
            assert found.dtype == dtype
            assert (found - expected).abs().max() <= tolerance
            assert found.abs().max() > 100 * tolerance or dtype in (torch.bfloat16, torch.float16)
    for ours, theirs in zip(preallocated.layers, plain.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.transformer.h[1].attn.resid_dropout.train(),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.transformer.h[1].mlp.act.register_forward_hook(lambda *_: None),
        lambda model: model.lm_head.register_forward_pre_hook(lambda *_: None),
        lambda model: setattr(model.transformer.h[0].attn, "forward", model.transformer.h[0].attn.forward),
        lambda model: setattr(model.transformer.h[0].mlp, "c_fc", nn.Bilinear(1, 1, 1)),
        lambda model: model.lm_head.double(),
        lambda model: setattr(model, "__class__", type("Subclass", (type(model),), {})),
    ],
)
def test_changed_models_have_no_step(change):
    model = make_model()
    assert model.bind_step(1) is not None
    change(model)
    assert model.bind_step(1) is None


def test_global_hooks_and_autocast_allow_no_step():
    model = make_model()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert model.bind_step(1) is None
    handle.remove()
    assert model.bind_step(1) is not None
    with torch.autocast("cpu"):
        assert model.bind_step(1) is None


@pytest.fixture(params=["onednn", "in parts"])
def calls(monkeypatch, request):
    """Makes toy models use the faster kernels as large ones do, and records the thread of each of their products."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    threads = []

    def spy(apply):
        def counted(*args):
            threads.append(threading.get_ident())
            return apply(*args)

        return counted

    split = fast._split
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: request.param == "in parts")
    monkeypatch.setattr(fast, "_is_intel", lambda: False)
    monkeypatch.setattr(fast, "_LARGE_MODEL", 0)
    monkeypatch.setattr(fast, "_LARGE_WEIGHT", 0)
    monkeypatch.setattr(fast, "_apply_onednn", spy(fast._apply_onednn))
    monkeypatch.setattr(fast, "_split", lambda *args: spy(split(*args)))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(3)  # most widths are not divisible by it
    yield threads
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("is_hooked", [False, True], ids=["steps", "forward passes"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"}])
def test_kernels_are_used_while_generating_and_only_then(calls, settings, is_hooked):
    model = make_model()
    if is_hooked:
        model.register_forward_pre_hook(lambda *_: None)
    tokens = model.generate(make_batch(1, 4)[0], max_new_tokens=4, **settings)
    assert len(calls) == 4 * 9  # passes, Linears
    plain = model.generate(make_batch(1, 4)[0], max_new_tokens=4, use_cache=False)
    assert settings or torch.equal(tokens, plain)
    model(make_batch(1, 4)[0])
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[65]]), max_new_tokens=4)
    model(make_batch(1, 4)[0])
    assert len(calls) == 4 * 9


def test_small_weights_stay_with_one_thread_of_blas(calls, monkeypatch):
    monkeypatch.setattr(fast, "_LARGE_WEIGHT", 2**20)
    make_model().generate(make_batch(1, 4)[0], max_new_tokens=4)
    assert calls == []


def test_generating_changes_nothing_for_other_threads_and_copies(calls):
    """Two calls of generate, with a copy and a forward pass while both run: each uses the same kernels as alone."""
    model = make_model()
    idx, _ = make_batch(1, 4)
    alone = model.generate(idx, max_new_tokens=8, do_sample=False)
    logits, n_alone = model(idx).logits, len(calls)
    calls.clear()
    barrier = threading.Barrier(3, timeout=30)
    found = {}

    def wait(input_ids, scores):
        if input_ids.shape[1] == 8:
            barrier.wait()  # both are in the middle
            barrier.wait()
        return scores

    def run(name):
        found[name] = model.generate(idx, max_new_tokens=8, do_sample=False, logits_processor=[wait])
        found[name, "thread"] = threading.get_ident()

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    barrier.wait()
    twin = copy.deepcopy(model)
    assert torch.equal(model(idx).logits, logits)
    assert all("forward" not in vars(module) for each in (model, twin) for module in each.modules())
    barrier.wait()
    for thread in threads:
        thread.join(timeout=30)
    assert torch.equal(found["a"], alone)
    assert torch.equal(found["b"], alone)
    assert {name: calls.count(found[name, "thread"]) for name in "ab"} == {"a": n_alone, "b": n_alone}
    assert len(calls) == 2 * n_alone
    assert torch.equal(twin.generate(idx, max_new_tokens=8, do_sample=False), alone)


def test_wrapped_modules_and_unusual_weights_are_left_alone(calls):
    class Weight(torch.Tensor):
        pass

    class Wrapped(nn.Linear):
        def forward(self, inputs):
            return linear(inputs.as_subclass(Weight), self.weight, self.bias).as_subclass(torch.Tensor)

    model = make_model()
    plain = model.generate(make_batch(1, 4)[0], max_new_tokens=4, do_sample=False)
    calls.clear()
    wrapped = Wrapped(32, 128)
    wrapped.load_state_dict(model.transformer.h[0].mlp.c_fc.state_dict())
    model.transformer.h[0].mlp.c_fc = wrapped
    assert torch.equal(model.generate(make_batch(1, 4)[0], max_new_tokens=4, do_sample=False), plain)
    assert len(calls) == 4 * 8


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
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, when it is imported
def test_compiled_models_are_left_alone(compile_part):
    model = make_model()
    assert not fast.has_compiled_parts(model)
    compile_part(model)
    assert fast.has_compiled_parts(model)
    assert model.bind_step(1) is None


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # the switch reads and sets a flag of Intel GPUs too
def test_kernels_can_be_switched_off_with_torchs_own_switch(calls):
    with torch.backends.mkldnn.flags(enabled=False):
        make_model().generate(make_batch(1, 4)[0], max_new_tokens=4)
    assert calls == []


def make_linear(bias, n_rows, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(256, 3001, bias=bias).to(dtype)
    nn.init.normal_(layer.weight)
    batch = min(n_rows, 2)
    return layer, torch.randn(batch, n_rows // batch, 256, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "n_rows", "n_calls", "tolerance"),
    # sums of 256 products of size 1: in float32 in another order; float16 rounds the result, which is up to 60
    [
        *[(torch.float32, n, 1, 1e-4) for n in (1, 2, 4, 16, 32)],
        *[(torch.float16, n, 2, 0.04) for n in (8, 16, 80)],  # the 3001 outputs in pieces of 2048
    ],
)
def test_kernel_equals_linear(calls, bias, dtype, n_rows, n_calls, tolerance):
    layer, inputs = make_linear(bias, n_rows, dtype)
    with torch.no_grad():
        expected = linear(inputs.double(), layer.weight.double(), layer.bias.double() if bias else None)
        with fast._Kernels():
            found = layer(inputs)
        assert len(calls) == n_calls
        assert torch.equal(fast.bind_linear(layer, n_rows)(inputs.flatten(0, 1)), found.flatten(0, 1))
        assert len(calls) == 2 * n_calls
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "n_rows"),
    [
        (torch.float32, 34),
        (torch.float16, 6),
        *[(dtype, n) for dtype in (torch.bfloat16, torch.float64) for n in (1, 8, 80)],
    ],
)
def test_where_the_kernel_gains_nothing_linear_is_torchs_own(calls, bias, dtype, n_rows):
    layer, inputs = make_linear(bias, n_rows, dtype)
    expected = linear(inputs, layer.weight, layer.bias)
    with torch.no_grad(), fast._Kernels():
        assert torch.equal(layer(inputs), expected)
        assert torch.equal(fast.bind_linear(layer, n_rows)(inputs.flatten(0, 1)), expected.flatten(0, 1))
    assert calls == []


def test_weights_on_another_device_are_left_alone(calls):
    layer, inputs = make_linear(True, 1, torch.float32)
    with torch.no_grad(), fast._Kernels():
        assert layer.to("meta")(inputs.to("meta")).shape == (1, 1, 3001)
    assert calls == []


@pytest.mark.parametrize("is_linux", [True, False])
@pytest.mark.parametrize(
    ("has_mkl", "vendor", "capability", "expected"),
    [
        (True, "AuthenticAMD", "AVX512", ["parts", "parts", "onednn", "linear"]),
        (True, "AuthenticAMD", "AVX2", ["parts", "parts", "onednn", "linear"]),
        (True, "GenuineIntel", "AVX512", ["linear", "onednn", "onednn", "linear"]),
        (True, "GenuineIntel", "AVX2", ["linear", "linear", "linear", "linear"]),
        (False, "AuthenticAMD", "AVX2", ["onednn", "onednn", "onednn", "linear"]),
    ],
)
def test_the_product_depends_on_the_processor(has_mkl, vendor, capability, expected, is_linux, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(fast, "Path", lambda path: tmp_path / ("cpuinfo" if is_linux else "missing"))
    monkeypatch.setattr(fast.platform, "processor", lambda: f"Family 25 Model 1, {vendor}")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(fast, "_is_intel", fast._is_intel.__wrapped__)
    names = {fast._apply_in_parts: "parts", fast._apply_onednn: "onednn", linear: "linear"}
    assert [names[fast._choose(torch.empty(768, 768), n_rows)] for n_rows in (1, 4, 8, 33)] == expected


@torch.no_grad()
def test_a_layer_with_fewer_outputs_than_threads(calls):
    layer, inputs = nn.Linear(256, 2), torch.randn(1, 256)
    assert (fast.bind_linear(layer, 1)(inputs) - layer(inputs)).abs().max() < 1e-5
    assert len(calls) == 1


def test_gradients_flow_where_someone_asks_for_them(calls):
    model = make_model()
    with fast.use_kernels(model)(), torch.enable_grad():
        model(make_batch(1, 4)[0]).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_attends_in_float32(dtype):
    model = make_model().to(dtype)
    idx, _ = make_batch(2, 6)
    output = model.generate(idx, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert output.logits[0].dtype == torch.float32
    assert all(layer.keys.dtype == torch.float32 for layer in output[CACHE_NAME].layers)
    uncached = model.generate(idx, max_new_tokens=1, do_sample=False, use_cache=False)
    assert torch.equal(output.sequences[:, :7], uncached)


def make_states(batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 2, length, 4, generator=generator) for _ in range(2))


def test_preallocated_layer_equals_a_dynamic_one():
    """With everything that generation modes do to a cache, up to max_length and beyond it."""
    filled, plain = DynamicCache(), DynamicCache()
    filled.layers = [PreallocatedLayer(max_length=9)]
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
        for cache in (filled, plain):
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
            kept, filled = filled, copy.deepcopy(filled)
        assert filled.get_seq_length() == plain.get_seq_length(), (step, action)
        for found, expected in zip(*results, strict=True) if results else ():
            assert torch.equal(found, expected), (step, action)
    assert kept.get_seq_length() == 6  # the copy does not share later tokens


def test_preallocated_layer_copies_old_tokens_rarely():
    layer = PreallocatedLayer(max_length=1000)
    addresses = set()
    for step in range(1000):
        states = torch.stack(list(make_states(1, 1, step)), dim=1)
        keys, values = layer.update(*states.unbind(1)) if step % 2 == 0 else layer.append(states)
        assert torch.equal(torch.stack([keys, values], dim=1)[:, :, :, -1:], states)
        addresses.add(keys.data_ptr())
    assert keys.shape == (1, 2, 1000, 4)
    assert layer._memory[0].shape[3] == 1000
    assert len(addresses) <= 11


def test_what_a_layer_has_returned_never_changes():
    layer = PreallocatedLayer(max_length=30)
    returned = []

    def keep(*states):
        returned.extend((state, state.clone()) for state in states)

    keep(*layer.update(*make_states(1, 5, 0)))
    twins = [copy.copy(layer), copy.deepcopy(layer)]
    for seed, each in enumerate([layer, *twins, layer], start=1):
        keep(*each.update(*make_states(1, 1, seed)))
        each.crop(-2)
        keep(each.keys, each.values)
        keep(*each.append(torch.stack(list(make_states(1, 1, 10 + seed)), dim=1)))
    for state, original in returned:
        assert torch.equal(state, original)
    assert layer.get_seq_length() == 5


def test_keys_of_a_returned_cache_stay_as_they_are():
    model = make_model()
    idx, _ = make_batch(1, 6)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    output = model.generate(idx, max_new_tokens=6, **settings)
    cache = output[CACHE_NAME]
    returned = [(layer.keys, layer.keys.clone(), layer.values, layer.values.clone()) for layer in cache.layers]
    cache.crop(-3)  # the caller goes back three tokens and continues differently
    text = torch.cat([output.sequences[:, : cache.get_seq_length()], torch.tensor([[3]])], dim=1)
    tokens = model.generate(text, max_new_tokens=30, past_key_values=cache, **settings).sequences
    for keys, old_keys, values, old_values in returned:
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)
    assert torch.equal(tokens, model.generate(text, max_new_tokens=30, do_sample=False))

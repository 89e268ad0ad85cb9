"""The loss: nanoGPT's own, what Transformers and its users can change, and the loss in chunks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import LOSS_MAPPING

from hugging_nano_gpt.model.loss_nano_gpt import compute_loss

from ..helpers.processes import needs_gloo
from ..helpers.tiny import TORCH_VERSION, make_batch, make_model, make_pair

HALVES = [torch.bfloat16, torch.float16]


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of a floating-point result."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                self.elements = max(self.elements, each.numel())
        return result


class Operations(TorchDispatchMode):
    """Records each operation and the dtypes of its inputs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        dtypes = [str(each.dtype) for each in args if isinstance(each, torch.Tensor) and each.is_floating_point()]
        if dtypes and not str(func).startswith(("prim.", "aten.detach", "aten._unsafe_view", "aten.view")):
            self.names.append((str(func), *dtypes))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch):
    """Records the arguments of cross_entropy."""
    calls = []

    def note(logits, *args, **kwargs):
        calls.append((logits.dtype, logits.data_ptr()))
        return cross_entropy(logits, *args, **kwargs)

    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", note)
    return calls


@pytest.mark.parametrize("dtype", HALVES)
def test_under_autocast_the_logits_are_not_copied(calls, dtype):
    model, _ = make_pair()
    idx, targets = make_batch(2, 16)
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(idx, shift_labels=targets)
    assert calls == [(dtype, outputs.logits.data_ptr())]


def test_under_autocast_loss_and_gradients_equal_reference_bitwise():
    model, reference = make_pair(dropout=0.1)
    idx, targets = make_batch(4, 32)
    targets[0, :5] = -1
    losses = []
    for run in (lambda: model(idx, shift_labels=targets).loss, lambda: reference(idx, targets)[1]):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(run())
        losses[-1].backward()
    assert torch.equal(*losses)
    gradients = dict(reference.named_parameters())
    assert all(torch.equal(parameter.grad, gradients[name].grad) for name, parameter in model.named_parameters())


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that knows CUDA, though no GPU")
def test_under_autocast_on_cuda_the_operations_are_those_of_nanogpt(monkeypatch):
    """There log_softmax computes in bfloat16; with logits converted to float32, the numbers would be others."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    found = []
    with FakeTensorMode():
        logits = torch.empty(2, 8, 65, device="cuda", dtype=torch.bfloat16)
        targets = torch.empty(2, 8, device="cuda", dtype=torch.int64)
        for compute in (
            lambda: compute_loss(logits, targets.view(-1)),
            lambda: F.cross_entropy(logits.view(-1, 65), targets.view(-1), ignore_index=-1),
            lambda: F.cross_entropy(logits.float().view(-1, 65), targets.view(-1)),
        ):
            torch.set_autocast_enabled("cuda", True)
            try:
                with Operations() as operations:
                    compute()
            finally:
                torch.set_autocast_enabled("cuda", False)
            found.append(operations.names)
    assert found[0] == found[1]
    assert ("aten._log_softmax.default", "torch.bfloat16") in found[0]
    assert found[2] != found[1]


@pytest.mark.parametrize("chunk_size", [None, 64])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_without_autocast_has_a_float32_loss(dtype, chunk_size):
    """Both have the rounding errors of the logits themselves; float32 sums add at most 1e-3."""
    model, _ = make_pair(vocab_size=300)
    idx, targets = make_batch(64, 32, vocab_size=300)
    model.to(dtype)
    expected = F.cross_entropy(model(idx).logits.float().flatten(0, 1), targets.flatten())
    model.config.loss_chunk_size = chunk_size
    loss = model(idx, shift_labels=targets).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_float16_sum_beyond_its_range_is_finite():
    """1,024 tokens at over 64 nats are over 65,504, the largest float16."""
    model, _ = make_pair()
    model.lm_head.weight.data *= 20
    idx, targets = make_batch(32, 32)
    model.to(torch.float16)
    model.config.loss_chunk_size = 1024
    with torch.no_grad():
        assert 64 < model(idx, shift_labels=targets).loss < 1000


def test_float64_stays_float64():
    model = make_model().double()
    idx, targets = make_batch(2, 8)
    outputs = model(idx, shift_labels=targets)
    assert torch.equal(outputs.loss, F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten()))
    assert outputs.loss.dtype == torch.float64


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_another_ignore_index_is_used(chunk_size):
    model, reference = make_pair()
    idx, targets = make_batch(2, 16)
    targets[:, :6] = 3
    model.config.loss_chunk_size = chunk_size
    loss = model(idx, shift_labels=targets, ignore_index=3).loss
    torch.testing.assert_close(loss, reference(idx, targets.masked_fill(targets == 3, -1))[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_loss_function_that_users_set_takes_the_place(chunk_size):
    model = make_model()
    model.config.loss_chunk_size = chunk_size
    idx, targets = make_batch(2, 16)
    seen = {}

    def compute_loss(logits, labels, vocab_size, **kwargs):
        seen.update(kwargs, labels=labels, vocab_size=vocab_size)
        return logits.mean()

    model.loss_function = compute_loss
    outputs = model(idx, labels=targets, num_items_in_batch=7)
    assert torch.equal(outputs.loss, outputs.logits.mean())
    assert torch.equal(seen["labels"], targets)
    assert (seen["vocab_size"], seen["num_items_in_batch"], seen["shift_labels"]) == (65, 7, None)


def test_loss_type_that_users_set_takes_the_place(monkeypatch):
    monkeypatch.setitem(LOSS_MAPPING, "Mean", lambda logits, **kwargs: logits.mean())
    model = make_model()
    model.loss_type = "Mean"
    idx, targets = make_batch(2, 16)
    outputs = model(idx, labels=targets)
    assert torch.equal(outputs.loss, outputs.logits.mean())


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_targets_may_lie_on_another_device_than_the_logits(chunk_size):
    """As with device_map, where the head can be on another device; here it is the meta device."""
    model = make_model()
    idx, targets = make_batch(2, 16)
    model.config.loss_chunk_size = chunk_size
    model.to("meta")
    assert model(idx.to("meta"), shift_labels=targets, num_items_in_batch=torch.tensor(3)).loss.device.type == "meta"


@pytest.mark.parametrize("is_training", [True, False])
def test_chunked_loss_never_has_all_logits(is_training):
    model, _ = make_pair(vocab_size=1000)
    model.train(is_training)
    idx, targets = make_batch(4, 32, vocab_size=1000)
    sizes = []
    for chunk_size in (None, 16):
        model.config.loss_chunk_size = chunk_size
        with LargestTensor() as largest, torch.set_grad_enabled(is_training):
            loss = model(idx, shift_labels=targets).loss
            if is_training:
                loss.backward()
        sizes.append(largest.elements)
    assert sizes == [4 * 32 * 1000, max(16 * 1000, 1000 * 32)]  # the second is the weight of the head and its gradient


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch before 2.13 uses checkpoint")
def test_chunked_loss_refuses_second_derivatives():
    """They would lack the loss's own part, without an error."""
    model, _ = make_pair()
    model.config.loss_chunk_size = 8
    idx, targets = make_batch(2, 16)
    loss = model(idx, shift_labels=targets).loss
    with pytest.raises(RuntimeError, match=r"loss_chunk_size .* expected no create_graph=True, got it; set .* None"):
        torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)
    model(idx, shift_labels=targets).loss.backward()


class AddedToHead(nn.Module):
    """A head with an adapter, as PEFT makes it."""

    def __init__(self, head):
        super().__init__()
        self.head, self.added = head, nn.Linear(head.in_features, head.out_features)

    @property
    def weight(self):
        return self.head.weight

    def forward(self, x):
        return self.head(x) + self.added(x)


@pytest.mark.parametrize("change", ["module", "hook", "function"])
def test_chunked_loss_calls_the_head_as_a_module(change):
    model, _ = make_pair()
    if change == "module":
        model.lm_head = AddedToHead(model.lm_head)
    elif change == "hook":
        model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    else:
        model.lm_head.forward = lambda rows: 2 * nn.functional.linear(rows, model.lm_head.weight)
    idx, targets = make_batch(2, 16)
    losses = []
    for chunk_size in (None, 8):
        model.config.loss_chunk_size = chunk_size
        losses.append(model(idx, shift_labels=targets).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    losses[1].backward()
    assert change != "module" or model.lm_head.added.weight.grad.abs().max() > 0


@pytest.fixture
def process_group():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_gloo
@pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="FSDP2 of torch 2.6 does not run on a CPU")
def test_chunked_loss_goes_through_a_sharded_head(process_group):
    model, _ = make_pair()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    idx, targets = make_batch(2, 16)
    model(idx, shift_labels=targets).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.config.loss_chunk_size = 8
    for module in (*model.transformer.h, model.lm_head, model):
        fully_shard(module)
    model(idx, shift_labels=targets).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="the compiler of torch 2.6 fails on Transformers' code")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
def test_chunked_loss_compiles_without_a_break():
    model, _ = make_pair(n_layer=1)
    idx, targets = make_batch(2, 16)
    model.config.loss_chunk_size = 8
    expected = model(idx, shift_labels=targets).loss
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(idx, shift_labels=targets).loss, expected, rtol=1e-6, atol=0)

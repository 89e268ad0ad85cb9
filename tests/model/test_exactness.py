"""Our model equals the independent reference of nanoGPT bit for bit, compared in one process."""

import pytest
import torch
import torch.nn.functional as F

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel

from ..helpers.tiny import MODEL_ARGS, make_batch, make_pair

BLOCK_SIZE = MODEL_ARGS["block_size"]


def run_both(model, reference, idx, targets, seed=5):
    torch.manual_seed(seed)
    logits, loss = reference(idx, targets)
    loss.backward()
    torch.manual_seed(seed)
    outputs = model(idx, shift_labels=targets)
    outputs.loss.backward()
    return outputs, logits, loss


def assert_same_gradients(model, reference):
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name].grad, theirs[name].grad)]
    assert not different


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("length", [1, 7, BLOCK_SIZE])
def test_forward_and_backward_equal_reference_bitwise(bias, dropout, length):
    model, reference = make_pair(bias=bias, dropout=dropout)
    outputs, logits, loss = run_both(model, reference, *make_batch(4, length))
    assert torch.equal(outputs.logits, logits)
    assert torch.equal(outputs.loss, loss)
    assert_same_gradients(model, reference)


def test_forward_in_eval_mode_equals_reference_bitwise():
    model, reference = make_pair(dropout=0.1)
    idx, _ = make_batch(3, 20)
    assert torch.equal(model.eval()(idx).logits, reference.eval()(idx)[0])


@pytest.mark.parametrize("activation_function", ["gelu_new", "gelu_pytorch_tanh"])
def test_forward_with_another_activation_differs_from_reference(activation_function):
    """Shows that the comparison can fail: with these weights the tanh GELU changes logits by more than 1e-4."""
    model, reference = make_pair()
    other = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS, activation_function=activation_function))
    other.load_state_dict(model.state_dict())
    idx, _ = make_batch(2, BLOCK_SIZE)
    assert (other.eval()(idx).logits - reference.eval()(idx)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("ignored", [-1, -100])
def test_loss_with_ignored_targets_equals_reference_bitwise(ignored):
    model, reference = make_pair()
    idx, targets = make_batch(2, 16)
    targets[:, ::3] = -1
    ours = targets.masked_fill(targets == -1, ignored)
    assert torch.equal(model(idx, shift_labels=ours).loss, reference(idx, targets)[1])
    assert torch.equal(targets.masked_fill(targets == -1, ignored), ours)  # the caller's labels do not change


def test_loss_of_labels_shifts_inside_as_transformers_does():
    model, _ = make_pair()
    idx, _ = make_batch(2, 16)
    labels = idx.masked_fill(idx % 7 == 0, -100)
    outputs = model(idx, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-6, atol=0)  # another order of summing


def test_loss_with_num_items_in_batch_is_sum_divided():
    model, _ = make_pair()
    idx, targets = make_batch(2, 16)
    loss = model(idx, shift_labels=targets, num_items_in_batch=torch.tensor(8)).loss
    torch.testing.assert_close(loss, model(idx, shift_labels=targets).loss * 4, rtol=1e-6, atol=0)


def train(model, compute_loss, steps):
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    torch.manual_seed(7)
    for step in range(steps):
        compute_loss(*make_batch(4, BLOCK_SIZE, seed=step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("bias", [True, False])
def test_training_of_100_steps_with_dropout_equals_reference_bitwise(bias):
    model, reference = make_pair(bias=bias, dropout=0.1)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(reference, lambda idx, targets: reference(idx, targets)[1], steps=100)
    train(model, lambda idx, targets: model(idx, shift_labels=targets).loss, steps=100)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert not torch.equal(ours, start[name]), name


def test_gradients_with_checkpointing_equal_those_without_bitwise():
    model, reference = make_pair(dropout=0.1)
    # renamed in transformers 5.23
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    idx, targets = make_batch(4, BLOCK_SIZE)
    outputs, _, loss = run_both(model, reference, idx, targets)
    assert torch.equal(outputs.loss, loss)
    assert_same_gradients(model, reference)


def test_logits_to_keep_equals_last_row_of_nanogpt_bitwise():
    """Without targets, nanoGPT computes only the logits of the last position, as generate does."""
    model, reference = make_pair()
    idx, _ = make_batch(2, 16)
    hidden = model.eval().transformer(idx).last_hidden_state
    last = model(idx, logits_to_keep=1).logits
    assert torch.equal(last, reference.lm_head(hidden[:, [-1], :]))
    assert torch.equal(model(idx, logits_to_keep=torch.tensor([3, 5])).logits, reference.lm_head(hidden[:, [3, 5], :]))


# chunks are summed in another order than all tokens at once
CHUNKED = {"rtol": 1e-5, "atol": 0}


@pytest.mark.parametrize("target_name", ["labels", "shift_labels"])
@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": torch.tensor(50)}, {"num_items_in_batch": 50}])
def test_chunked_loss_and_gradients_equal_those_of_all_logits(target_name, extra):
    model, _ = make_pair()
    idx, targets = make_batch(4, 20)
    targets[0, :7] = -1
    results = []
    for size in (None, 16, 1000):
        model.zero_grad()
        model.config.loss_chunk_size = size
        outputs = model(idx, **{target_name: targets}, **extra)
        outputs.loss.backward()
        assert (outputs.logits is None) is (size is not None)
        results.append((outputs.loss, [parameter.grad.clone() for parameter in model.parameters()]))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], **CHUNKED)
        for gradient, expected in zip(gradients, results[0][1], strict=True):
            assert (gradient - expected).norm() <= 1e-4 * expected.norm()

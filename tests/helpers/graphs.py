"""ONNX graphs: what is in them, and the tolerance for what ONNX Runtime computes from them."""

import numpy as np
import pytest
import torch

from .tiny import make_batch

onnx = pytest.importorskip("onnx")

# For the order of float32 sums, with logits of up to 13; docs/onnx.md has what was measured.
ATOL = 1e-4


def read_graph(folder) -> "onnx.GraphProto":
    proto = onnx.load(folder / "model.onnx")
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", 18)]
    assert not proto.functions
    return proto.graph


def read_weights(graph) -> dict[str, np.ndarray]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer if "." in each.name}


def find_differences(graph, model) -> list[str]:
    """Names the weights of a graph that differ from the model's in any bit."""
    weights, expected = read_weights(graph), {name: t.detach().numpy() for name, t in model.named_parameters()}
    assert weights.keys() == expected.keys()
    return [name for name in weights if weights[name].tobytes() != expected[name].tobytes()]


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


def make_padded_batch(batch, length) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes idx and an attention_mask of rows with 0, 3, 6, ... tokens of padding on the left."""
    return make_batch(batch, length)[0], (torch.arange(length) >= 3 * torch.arange(batch)[:, None]).long()

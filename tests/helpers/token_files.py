"""Token files of nanoGPT and of llm.c, and the batches that get_batch makes of them."""

import numpy as np
import torch

MAGIC, VERSION = 20240520, 1
BLOCK_SIZE = 8
TOKENS = np.random.default_rng(0).integers(0, 2**16, 500).astype("<u2")  # also ids that do not fit in int16


def write_plain(path, tokens=TOKENS):
    path.write_bytes(tokens.tobytes())
    return path


def write_shard(path, tokens=TOKENS, magic=MAGIC, version=VERSION, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


def assert_is_batch(batch, offsets, tokens=TOKENS):
    """Asserts that a batch is the one that get_batch makes of these offsets: x from i, y from i + 1."""
    for name, shift in (("input_ids", 0), ("shift_labels", 1)):
        expected = np.stack([tokens[i + shift : i + shift + BLOCK_SIZE].astype(np.int64) for i in offsets])
        assert batch[name].dtype == torch.int64
        assert torch.equal(batch[name], torch.from_numpy(expected))

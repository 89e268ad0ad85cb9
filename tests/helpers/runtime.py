"""Runs a folder of export_onnx with only ONNX Runtime and numpy, like a machine without torch and Transformers."""

import json
from pathlib import Path

import numpy as np
import onnxruntime


class Runtime:
    """A session on one folder, and the keys and values of the tokens so far."""

    def __init__(self, folder: Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = {each.name: each for each in self.session.get_outputs()}
        self.suppressed = json.loads((folder / "generation_config.json").read_text()).get("suppress_tokens") or []
        self.past: dict[str, np.ndarray] = {}

    def start(self, batch: int) -> None:
        """Forgets all tokens."""
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.past = {
            name: np.zeros((batch, each.shape[1], 0, each.shape[3]), dtypes[each.type])
            for name, each in self.inputs.items()
            if name.startswith("past_key_values")
        }

    def read(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the logits (B, T, V) of tokens (B, T) after those so far; the mask is (B, S), of all tokens."""
        if attention_mask is None:
            length = next(iter(self.past.values())).shape[2] + input_ids.shape[1]
            attention_mask = np.ones((len(input_ids), length), np.int64)
        position_ids = (attention_mask.cumsum(-1) - 1).clip(0)[:, -input_ids.shape[1] :]
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits, *present = self.session.run(list(self.outputs), {**feeds, **self.past})
        self.past = dict(zip(self.past, present, strict=True))
        return logits

    def compute(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the logits of tokens that no others precede."""
        self.start(len(input_ids))
        return self.read(input_ids, attention_mask)

    def generate(self, input_ids: np.ndarray, count: int, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Appends the most likely token count times; each step after the prompt uses the cached keys and values."""
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        new = input_ids
        self.start(len(input_ids))
        for _ in range(count):
            scores = self.read(new, mask)[:, -1]
            scores[:, self.suppressed] = -np.inf
            new = scores.argmax(-1, keepdims=True)
            input_ids, mask = np.hstack((input_ids, new)), np.hstack((mask, np.ones_like(new)))
        return input_ids

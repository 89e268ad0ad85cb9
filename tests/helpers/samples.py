"""The text of one sample, and the facts of the demo model as the playground shows them."""

import io

from hugging_nano_gpt import sample_text


def sample(*args, **kwargs):
    """Returns the text that sample_text prints for one sample, without the line after it."""
    stream = io.StringIO()
    sample_text(*args, num_samples=1, stream=stream, **kwargs)
    return stream.getvalue().removesuffix("\n---------------\n")


FACTS = {
    "model": "ckpt.pt",
    "kind": "nanoGPT checkpoint, since 2023-05-06",
    "layers": "3",
    "heads": "3",
    "width": "96",
    "block size": "128 tokens",
    "vocabulary": "65 tokens",
    "biases": "no",
    "dropout": "0.0",
    "activation": "exact GELU, nanoGPT's since June 2023",
    "output layer": "tied to the token embedding",
    "parameters": "350,976, or 338,688 as nanoGPT counts, without the positions",
    "iteration": "5,000",
    "validation loss": "1.6176",
    "computes on": "cpu, float32",
}

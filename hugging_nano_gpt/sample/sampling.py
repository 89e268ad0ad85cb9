"""Sampling text as nanoGPT's sample.py does (@ 3adf61e): the same defaults, and the same text from the same seed.

A prompt is encoded, and every token is written as text as soon as it is generated. A sample ends with the model's end
token; with ignore_eos it continues, as in sample.py.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
)

from ..convert.source import Source, choose_device, load_source
from ..errors import DataError
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.text import encode_text, read_text
from ..tokenization.vocabulary import make_generation_config

# What sample.py prints after each sample.
SEPARATOR = "---------------"
_FILE_PREFIX = "FILE:"


def sample_text(
    source: str | os.PathLike[str],
    prompt: str = "\n",
    *,
    num_samples: int = 10,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int = 1337,
    stride: int = 1,
    ignore_eos: bool = False,
    device: str | None = None,
    stream: TextIO | None = None,
    **kwargs: Any,
) -> None:
    """Samples texts that continue a prompt and writes them to a stream, with a line of dashes after each.

    The defaults are sample.py's. If the model has an end token, a text ends with it; with `ignore_eos` it goes on, as
    in sample.py. On a GPU, matrix products are in bfloat16 (float16 if it has no bfloat16) and TF32, as in sample.py,
    unless `dtype` is given.

    Args:
        source: What load_source takes: a checkpoint file, a saved folder or a Hub id.
        prompt: Text to continue, or FILE:name for the text of a file, as in sample.py.
        num_samples: Number of samples.
        max_new_tokens: Most tokens of each, past block_size too.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Number of likeliest tokens to choose among, 0 for all.
        seed: Seed of the random numbers; as in sample.py, random weights are drawn before the first sample.
        stride: Tokens dropped at once past block_size; 1 is nanoGPT's way (docs/generation.md).
        ignore_eos: Whether to go on after the end token up to max_new_tokens, as sample.py does.
        device: Device of torch; by default CUDA if there is a GPU for it, else the CPU.
        stream: Where to write; standard output by default.
        **kwargs: What load_source takes (convert/source.py), such as `meta_path`, `tokenizer`, `dtype`, `revision`.

    Raises:
        DeviceError: If torch cannot compute on the device.
        CheckpointError: If there is no whole model.
        TokenizerError: If there is no tokenizer, or the prompt has what it does not know.
        DataError: If the prompt's file cannot be read, or the stride is out of range.
    """
    loaded = load_source(source, device=choose_device(device), **kwargs)
    sampler = make_sampler(loaded, is_autocast=kwargs.get("dtype") is None, ignore_eos=ignore_eos)
    block_size = sampler.model.config.block_size
    if not 1 <= stride <= block_size:
        raise DataError(f"stride: expected 1 to block_size={block_size}, got {stride}; change --stride")
    idx = sampler.encode(_read_prompt(prompt))
    stream = sys.stdout if stream is None else stream
    sampler.seed(seed)
    for _ in range(num_samples):
        sampler.draw(
            idx,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            stride=stride,
            streamer=_StreamWriter(sampler.tokenizer, stream),
        )
        print(SEPARATOR, file=stream)


@dataclass(frozen=True)
class Sampler:
    """A model that samples as sample.py does, and its tokenizer; make_sampler makes one.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        autocast_dtype: What matrix products are computed in, as sample.py does on a GPU; None for the model's dtype.
    """

    model: NanoGPTLMHeadModel
    tokenizer: PreTrainedTokenizerBase
    autocast_dtype: torch.dtype | None = None

    def encode(self, prompt: str) -> torch.Tensor:
        """Returns the ids of a prompt, (1, T) int64 on the model's device.

        Raises:
            TokenizerError: If the prompt has what the tokenizer does not know, or nothing.
        """
        return torch.tensor([encode_text(self.tokenizer, prompt)], device=self.model.device)

    def seed(self, seed: int) -> None:
        """Seeds torch's global random numbers as sample.py does: random weights are drawn before the first sample."""
        _seed_as_sample_py(self.model.config, seed)

    def draw(
        self,
        idx: torch.Tensor,
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        stride: int = 1,
        observe: LogitsProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        """Generates a sample with torch's global random numbers.

        Args:
            idx: (1, T) int64, the prompt.
            max_new_tokens: Most tokens to generate, past block_size too.
            temperature: Divides the logits; 0 always takes the likeliest token.
            top_k: Number of likeliest tokens to choose among, 0 for all.
            stride: Tokens dropped at once past block_size.
            observe: Is called with the tokens so far (1, T) and the logits (1, V) float32 of the next one, after
                temperature and top_k, and returns the logits.
            **kwargs: What generate takes, such as `streamer` and `stopping_criteria`.
        """
        is_greedy = temperature == 0
        generate_kwargs: dict[str, Any] = (
            {"do_sample": False} if is_greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        )
        processors: list[LogitsProcessor] = [] if is_greedy else [TemperatureLogitsWarper(float(temperature))]
        if self.autocast_dtype is not None:  # the dtype of sample.py's logits, also after the temperature
            processors.append(_Rounding(self.autocast_dtype))
            # Keys from a cache are rounded differently from those of a whole pass, which is what sample.py computes.
            kwargs.setdefault("use_cache", stride > 1)
        processors += [TopKLogitsWarper(top_k)] if top_k > 0 and not is_greedy else []
        processors += [observe] if observe is not None else []
        with _computing_as_sample_py(self.model.device.type, self.autocast_dtype):
            self.model.generate(
                idx,
                max_new_tokens=max_new_tokens,
                **generate_kwargs,
                logits_processor=LogitsProcessorList(processors),
                stride=stride,
                **kwargs,
            )


def make_sampler(source: Source, *, is_autocast: bool = True, ignore_eos: bool = False) -> Sampler:
    """Makes the sampler of a model that was loaded with its tokenizer.

    Args:
        source: The model, whose generation_config is replaced, and its tokenizer.
        is_autocast: Whether matrix products on a GPU are in bfloat16, as in sample.py, or else in the model's dtype.
        ignore_eos: Whether to generate max_new_tokens, as sample.py does, or else stop at the end token.

    Raises:
        TokenizerError: If there is no tokenizer.
    """
    model = source.model
    # sample.py does not know what else a generation_config.json may set, such as a top_p or a penalty.
    found = make_generation_config(model, source.tokenizer)
    eos = None if ignore_eos else found.eos_token_id
    model.generation_config = GenerationConfig(suppress_tokens=found.suppress_tokens, eos_token_id=eos)
    if not is_autocast or model.device.type != "cuda":
        return Sampler(model, source.tokenizer)
    autocast_dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return Sampler(model, source.tokenizer, autocast_dtype)


class _Rounding(LogitsProcessor):
    """Rounds logits (B, V) to a smaller dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.to(self.dtype).to(scores.dtype)


@contextlib.contextmanager
def _computing_as_sample_py(device_type: str, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Turns on autocast, and TF32 for the remaining float32, inside the `with` block."""
    # torch 2.9 renamed the switch. Trainer sets the new one, after which the old one cannot even be read.
    switch = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(switch, "fp32_precision") else ("allow_tf32", True)
    before = getattr(switch, name)
    setattr(switch, name, value if device_type == "cuda" else before)
    try:
        with torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            yield
    finally:
        setattr(switch, name, before)


def _seed_as_sample_py(config: NanoGPTConfig, seed: int) -> None:
    """Seeds, then draws the random weights that sample.py draws between seeding and sampling."""
    C, tokens, positions = config.n_embd, (config.vocab_size, config.n_embd), (config.block_size, config.n_embd)
    layer = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]  # c_attn, c_proj, c_fc, c_proj
    torch.manual_seed(seed)
    for shape in (tokens, positions):
        nn.Embedding(*shape)
    for n_out, n_in in layer * config.n_layer:
        nn.Linear(n_in, n_out, bias=config.bias)
    nn.Linear(C, config.vocab_size, bias=False)
    # Then its own initialisation: every matrix, the tied one twice, and the residual projections once more.
    for shape in (tokens, positions, *layer * config.n_layer, tokens, *(layer[1], layer[3]) * config.n_layer):
        torch.empty(shape).normal_()


def _read_prompt(prompt: str) -> str:
    if not prompt.startswith(_FILE_PREFIX):
        return prompt
    text = read_text(Path(prompt.removeprefix(_FILE_PREFIX)))
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as open() gives it to sample.py


class _StreamWriter(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: TextIO):
        super().__init__(tokenizer)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._stream.write(f"{text}\n" if stream_end else text)
        self._stream.flush()

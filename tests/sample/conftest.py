"""The sampler of the demo model, for the tests of streaming and of the page."""

import pytest

from hugging_nano_gpt.convert.source import load_source
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.sample.sampling import make_sampler


@pytest.fixture(scope="module")
def sampler():
    return make_sampler(load_source(CKPT_PATH, meta_path=META_PATH))

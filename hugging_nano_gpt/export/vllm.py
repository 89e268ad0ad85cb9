"""vLLM's plugin: where this package is installed, vLLM serves saved folders without trust_remote_code.

vLLM calls register_with_vllm in each of its processes, through the entry point group `vllm.general_plugins`. Its
Transformers backend finds the model by the Auto classes, which importing this package registers. Without this plugin,
vLLM serves the same folders with their remote code (docs/vllm.md).
"""

from transformers.utils import logging

from ..model.modeling_nano_gpt import NanoGPTLMHeadModel

logger = logging.get_logger(__name__)

# By name, so that no device is touched before vLLM asks for the class.
_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register_with_vllm() -> None:
    """Registers the language model with vLLM's Transformers backend; calling it repeatedly changes nothing more.

    Never raises: vLLM does not guard the call, so an error would end its servers of all other models too.
    """
    try:
        from vllm import ModelRegistry

        ModelRegistry.register_model(NanoGPTLMHeadModel.__name__, _BACKEND)
    except Exception as error:  # of any type, in another release of vLLM
        logger.warning(
            f"hugging-nano-gpt: not registered with vLLM: {type(error).__name__}: {error}; serve the folders with "
            f"--trust-remote-code --model-impl transformers"
        )

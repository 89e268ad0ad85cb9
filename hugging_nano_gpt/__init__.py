"""huggingNanoGPT: nanoGPT checkpoints as native Transformers models, and back, with every number the same."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .checkpoint import Checkpoint, OptimizerState, TrainingState, read_checkpoint, write_checkpoint
from .configuration_nano_gpt import NanoGPTConfig
from .errors import CheckpointError, ConversionError, DataError, NanoGPTError, TokenizerError, VerifyError
from .modeling_nano_gpt import (
    NanoGPTForSequenceClassification,
    NanoGPTLMHeadModel,
    NanoGPTModel,
    NanoGPTPreTrainedModel,
)
from .verify import VerifyReport, verify_against_nanogpt, verify_loss, verify_models

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConversionError",
    "DataError",
    "NanoGPTConfig",
    "NanoGPTError",
    "NanoGPTForSequenceClassification",
    "NanoGPTLMHeadModel",
    "NanoGPTModel",
    "NanoGPTPreTrainedModel",
    "OptimizerState",
    "TokenizerError",
    "TrainingState",
    "VerifyError",
    "VerifyReport",
    "read_checkpoint",
    "verify_against_nanogpt",
    "verify_loss",
    "verify_models",
    "write_checkpoint",
]

AutoConfig.register(NanoGPTConfig.model_type, NanoGPTConfig)
AutoModel.register(NanoGPTConfig, NanoGPTModel)
AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTLMHeadModel)
AutoModelForSequenceClassification.register(NanoGPTConfig, NanoGPTForSequenceClassification)
# Trainer looks here, by class name, for whether label smoothing has to shift the labels; register leaves it out.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[NanoGPTConfig.model_type] = NanoGPTLMHeadModel.__name__

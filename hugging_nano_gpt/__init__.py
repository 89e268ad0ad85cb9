"""huggingNanoGPT: nanoGPT checkpoints as native Transformers models, and back, with every number the same."""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .checkpoint.formats import Checkpoint, OptimizerState, TrainingState, read_checkpoint, write_checkpoint
from .convert.folder import Conversion, convert_to_checkpoint, convert_to_folder
from .convert.gpt2 import export_gpt2, import_gpt2
from .convert.inspect import Inspection, inspect_path
from .errors import (
    CheckpointError,
    ConversionError,
    DataError,
    DeviceError,
    MissingDependencyError,
    NanoGPTError,
    ServerError,
    TokenizerError,
    VerifyError,
)
from .evaluate.evaluate import Evaluation, evaluate_loss
from .export.exporting import export_model
from .export.gguf import export_gguf
from .export.onnx import export_onnx
from .model.configuration_nano_gpt import NanoGPTConfig
from .model.modeling_nano_gpt import (
    NanoGPTForSequenceClassification,
    NanoGPTLMHeadModel,
    NanoGPTModel,
    NanoGPTPreTrainedModel,
)
from .prepare.prepare import prepare_data
from .sample.playground import run_playground
from .sample.sampling import sample_text
from .serve.server import run_server
from .tokenization.bpe import build_gpt2_tokenizer, build_tiktoken_tokenizer
from .tokenization.characters import CharacterTable, build_character_tokenizer, read_meta, write_meta
from .tokenization.find import find_tokenizer
from .tokenization.vocabulary import fit_vocabulary
from .verify import VerifyReport, verify_against_nanogpt, verify_models

try:
    __version__ = version("hugging-nano-gpt")
except PackageNotFoundError:  # run from a clone that is not installed
    __version__ = "unknown"

__all__ = [
    "CharacterTable",
    "Checkpoint",
    "CheckpointError",
    "Conversion",
    "ConversionError",
    "DataError",
    "DeviceError",
    "Evaluation",
    "Inspection",
    "MissingDependencyError",
    "NanoGPTConfig",
    "NanoGPTError",
    "NanoGPTForSequenceClassification",
    "NanoGPTLMHeadModel",
    "NanoGPTModel",
    "NanoGPTPreTrainedModel",
    "OptimizerState",
    "ServerError",
    "TokenizerError",
    "TrainingState",
    "VerifyError",
    "VerifyReport",
    "build_character_tokenizer",
    "build_gpt2_tokenizer",
    "build_tiktoken_tokenizer",
    "convert_to_checkpoint",
    "convert_to_folder",
    "evaluate_loss",
    "export_gguf",
    "export_gpt2",
    "export_model",
    "export_onnx",
    "find_tokenizer",
    "fit_vocabulary",
    "import_gpt2",
    "inspect_path",
    "prepare_data",
    "read_checkpoint",
    "read_meta",
    "run_playground",
    "run_server",
    "sample_text",
    "verify_against_nanogpt",
    "verify_models",
    "write_checkpoint",
    "write_meta",
]

AutoConfig.register(NanoGPTConfig.model_type, NanoGPTConfig)
AutoModel.register(NanoGPTConfig, NanoGPTModel)
AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTLMHeadModel)
AutoModelForSequenceClassification.register(NanoGPTConfig, NanoGPTForSequenceClassification)
# Trainer looks here, by class name, for whether label smoothing has to shift the labels; register leaves it out.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[NanoGPTConfig.model_type] = NanoGPTLMHeadModel.__name__

"""The public surface: what `from hugging_nano_gpt import *` gives, and nothing by accident."""

from importlib.metadata import version

import hugging_nano_gpt

PUBLIC_NAMES = """
CharacterTable Checkpoint CheckpointError Conversion ConversionError DataError DeviceError Evaluation Inspection
MissingDependencyError NanoGPTConfig NanoGPTError NanoGPTForSequenceClassification NanoGPTLMHeadModel NanoGPTModel
NanoGPTPreTrainedModel OptimizerState ServerError TokenizerError TrainingState VerifyError VerifyReport
build_character_tokenizer build_gpt2_tokenizer build_tiktoken_tokenizer convert_to_checkpoint convert_to_folder
evaluate_loss export_gguf export_gpt2 export_model export_onnx find_tokenizer fit_vocabulary import_gpt2 inspect_path
prepare_data read_checkpoint read_meta run_playground run_server sample_text verify_against_nanogpt verify_models
write_checkpoint write_meta
""".split()


def test_public_names_are_these_and_no_others():
    assert sorted(hugging_nano_gpt.__all__) == PUBLIC_NAMES
    assert all(hasattr(hugging_nano_gpt, name) for name in PUBLIC_NAMES)


def test_version_is_that_of_the_package():
    assert hugging_nano_gpt.__version__ == version("hugging-nano-gpt")


def test_errors_are_caught_as_one_and_as_builtin_errors():
    for name in ("CheckpointError", "ConversionError", "DataError", "TokenizerError"):
        error = getattr(hugging_nano_gpt, name)
        assert issubclass(error, hugging_nano_gpt.NanoGPTError)
        assert issubclass(error, ValueError)
    assert issubclass(hugging_nano_gpt.VerifyError, hugging_nano_gpt.NanoGPTError)
    assert issubclass(hugging_nano_gpt.VerifyError, RuntimeError)
    assert issubclass(hugging_nano_gpt.ServerError, hugging_nano_gpt.NanoGPTError)
    assert issubclass(hugging_nano_gpt.ServerError, OSError)
    assert issubclass(hugging_nano_gpt.DeviceError, hugging_nano_gpt.NanoGPTError)
    assert issubclass(hugging_nano_gpt.DeviceError, RuntimeError)


def test_missing_dependency_is_caught_as_an_import_error():
    assert issubclass(hugging_nano_gpt.MissingDependencyError, hugging_nano_gpt.NanoGPTError)
    assert issubclass(hugging_nano_gpt.MissingDependencyError, ImportError)


def test_public_objects_have_docstrings():
    assert not [name for name in PUBLIC_NAMES if not getattr(hugging_nano_gpt, name).__doc__]

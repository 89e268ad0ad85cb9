"""What the package uses of other libraries that may change without notice: private names, overrides, moved names.

`make next` prints which of these a new release has changed. tests/test_relied_on.py keeps the table true: it has every
private name that the package reads, and every method of Transformers' that it overrides.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

from .helpers.folders import ROOT

PACKAGE_DIR = ROOT / "hugging_nano_gpt"

# The names of each owner, with the arguments that the package passes by name. `a|b`: one or the other.
RELIED_ON: dict[str, list[str]] = {
    "transformers.GenerationMixin": [
        "_valid_auto_compile_criteria(model_kwargs, generation_config)",
        "prepare_inputs_for_generation(input_ids, next_sequence_length, attention_mask, inputs_embeds, "
        "is_first_iteration, past_key_values|cache)",
        "generate(generation_config, stopping_criteria, synced_gpus, assistant_model, streamer, custom_generate)",
        "init_continuous_batching",
        "generate_batch",
    ],
    "transformers.masking_utils": [
        "create_causal_mask(config, inputs_embeds, attention_mask, past_key_values|cache, position_ids)"
    ],
    "transformers.modeling_outputs.BaseModelOutputWithPast": ["past_key_values|cache"],
    "transformers.cache_utils.DynamicLayer": ["update(key_states, value_states)", "lazy_initialization"],
    "transformers.StopStringCriteria": ["clean_tokenizer_vocab(tokenizer, static_prefix)"],
    "transformers.TextStreamer": ["on_finalized_text(text, stream_end)"],
    "transformers.PreTrainedConfig": [
        "_attn_implementation",
        *("attribute_map", "base_model_fsdp_plan", "base_model_tp_plan", "from_dict", "model_type", "to_dict"),
    ],
    "transformers.PreTrainedModel": [
        "_init_weights(module)",
        "_upload_modified_files(working_dir)",
        *("_can_compile_fullgraph", "_can_record_outputs", "_fsdp_plan", "_no_split_modules", "_supports_sdpa"),
        *("_skip_keys_device_placement", "_supports_attention_backend", "_supports_flash_attn", "_supports_flex_attn"),
        *("_tied_weights_keys", "_tp_plan", "base_model_prefix", "config_class", "supports_gradient_checkpointing"),
        *("from_pretrained", "save_pretrained", "get_input_embeddings", "set_input_embeddings", "init_weights"),
        *("initialize_weights", "resize_token_embeddings"),
        "activation_checkpointing_enable|gradient_checkpointing_enable",
    ],
    "transformers.Trainer": [
        "_prepare_inputs(inputs)",
        "_prepare_input(data)",
        "_load_optimizer_and_scheduler(checkpoint)",
        "_save_checkpoint",
        "_save_rng_state(output_dir)",
        "_load_best_model",
        "train(resume_from_checkpoint)",
        "evaluate(eval_dataset, ignore_keys, metric_key_prefix)",
        "compute_loss(model, inputs, return_outputs, num_items_in_batch)",
        "create_scheduler(num_training_steps, optimizer)",
        "get_batch_samples(epoch_iterator, num_batches, device)",
        *("autocast_smart_context_manager", "create_accelerator_and_postprocess", "create_optimizer"),
        "log(logs, start_time)",
        *("floating_point_ops", "get_train_dataloader", "save_model"),
    ],
    "transformers.TrainerCallback": ["on_evaluate", "on_log", "on_save", "on_step_end", "on_train_begin"],
    "torch": ["_neg_view"],
    "torch.nn.Module": [
        *("_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl", "_forward_hooks", "_forward_pre_hooks"),
        "_modules",
    ],
    "torch.nn.modules.module": ["_global_forward_hooks", "_global_forward_pre_hooks"],
    "torch.ops.mkldnn": ["_linear_pointwise"],
    "pickle": ["_Unpickler"],
    "tiktoken.Encoding": ["_mergeable_ranks", "_pat_str", "_special_tokens"],
}

_LIBRARIES = ("accelerate", "huggingface_hub", "safetensors", "tokenizers", "torch", "transformers")


def find_changes() -> dict[str, str]:
    """Returns what the package needs and does not find: each dotted name, and what happened to it."""
    changes: dict[str, str] = {}
    for owner_name, entries in RELIED_ON.items():
        if importlib.util.find_spec(owner_name.partition(".")[0]) is None:
            continue  # an extra that is not installed
        for entry in entries:
            change = _find_change(_resolve(owner_name), entry)
            if change:
                changes[f"{owner_name}.{entry.partition('(')[0]}"] = change
    for module_name, name in list_imports():
        if _resolve(f"{module_name}.{name}") is None:
            changes.setdefault(f"{module_name}.{name}", "is not there to import")
    return changes


def list_names() -> list[str]:
    """Returns the names of the table without owner or arguments."""
    entries = (entry for entries in RELIED_ON.values() for entry in entries)
    return [name for entry in entries for name in entry.partition("(")[0].split("|")]


def list_imports() -> list[tuple[str, str]]:
    """Returns what the package imports from the modules of the libraries that it builds upon."""
    nodes = (node for tree in parse_package() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    found = {(node.module, alias.name) for node in nodes if node.level == 0 and node.module for alias in node.names}
    served = "transformers.cli.serving"  # it needs packages of the extra
    return sorted(each for each in found if each[0].split(".")[0] in _LIBRARIES and not each[0].startswith(served))


def parse_package() -> Iterator[ast.Module]:
    """Parses every file of the package."""
    return (ast.parse(path.read_text()) for path in sorted(PACKAGE_DIR.rglob("*.py")))


def _find_change(owner: Any, entry: str) -> str:
    names, _, arguments = entry.rstrip(")").partition("(")
    found = [name for name in names.split("|") if _has(owner, name)]
    if not found:
        return "is gone"
    if not arguments:
        return ""
    parameters = inspect.signature(getattr(owner, found[0])).parameters
    lost = [each for each in arguments.split(", ") if not parameters.keys() & set(each.split("|"))]
    return f"takes no {', '.join(lost)}" if lost else ""


def _resolve(dotted: str) -> Any:
    """Returns a module, or what an attribute of one is; None if it is gone."""
    parts = dotted.split(".")
    for n_parts in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError):
            return functools.reduce(
                lambda found, part: getattr(found, part, None),
                parts[n_parts:],
                importlib.import_module(".".join(parts[:n_parts])),
            )
    return None


def _has(owner: Any, name: str) -> bool:
    """Returns whether an owner or, of a class, what it makes has a name."""
    code = getattr(getattr(owner, "__init__", None), "__code__", None)
    is_set = code is not None and name in code.co_names
    return hasattr(owner, name) or name in getattr(owner, "__annotations__", {}) or is_set

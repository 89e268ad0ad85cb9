"""Uses saved folders like a machine without hugging_nano_gpt; a script that tests/model/test_hub.py runs.

Arguments: the folder of the test, and the number of threads of the logits to compare with. The folder contains
idx.safetensors and the saved folders; the script adds outputs.safetensors, facts.json and the folders saved again.
"""

import importlib.abc
import json
import shutil
import sys
from pathlib import Path


class Blocker(importlib.abc.MetaPathFinder):
    """Makes the installed package impossible to import."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hugging_nano_gpt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


BLOCKER = Blocker()
sys.meta_path.insert(0, BLOCKER)

import torch  # noqa: E402
import transformers  # noqa: E402
from packaging.version import Version  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cache,
    GenerationMixin,
    Trainer,
    TrainingArguments,
    pipeline,
)


def main(folder: Path, n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    idx = load_file(folder / "idx.safetensors")["idx"]
    facts: dict = {}
    outputs: dict[str, torch.Tensor] = {}

    def load(auto_class, name):
        return auto_class.from_pretrained(folder / name, trust_remote_code=True)

    facts["config"] = load(AutoConfig, "lm").to_dict()
    with torch.no_grad():
        model = load(AutoModelForCausalLM, "lm")
        outputs["lm"] = model(idx).logits
        outputs["lm_hidden"] = load(AutoModel, "lm")(idx).last_hidden_state
        outputs["base"] = load(AutoModel, "base")(idx).last_hidden_state
        outputs["classifier"] = load(AutoModelForSequenceClassification, "classifier")(idx).logits
        outputs["from_lm"] = load(AutoModelForSequenceClassification, "lm").transformer(idx).last_hidden_state
        outputs["untied"] = load(AutoModelForCausalLM, "untied")(idx).logits
        outputs["sharded"] = load(AutoModelForCausalLM, "sharded")(idx).logits
        if Version(transformers.__version__).release >= (5, 14):  # older ones do not find all files of that folder
            earlier, golden_idx = (
                load(AutoModelForCausalLM, "earlier"),
                load_file(folder / "golden.safetensors")["idx"],
            )
            outputs["earlier"] = earlier(golden_idx).logits
            outputs["earlier_tokens"] = earlier.generate(golden_idx[:, :4], max_new_tokens=28, do_sample=False)
    n_new = model.config.block_size + 8  # past block_size
    outputs["generated"] = model.generate(idx[:1, :4], max_new_tokens=n_new, do_sample=False)
    pipe = pipeline("text-generation", model=str(folder / "lm"), trust_remote_code=True, device="cpu")
    facts["pipeline"] = pipe("ROMEO:", max_new_tokens=8, do_sample=False)[0]["generated_text"]

    facts["renamed"], facts["broken"] = generate_with_other_caches(model, idx[:1, :4])

    facts["module"] = type(model).__module__
    facts["training_state"] = repr(model.nanogpt_training_state)
    try:
        type(model).from_nanogpt_ckpt(folder / "ckpt.pt")
    except ImportError as error:
        facts["import_error"] = str(error)

    model.save_pretrained(folder / "again")
    model.transformer.save_pretrained(folder / "again-base")
    for _ in range(2):  # the second one overwrites the first
        load(AutoModelForCausalLM, "again").save_pretrained(folder / "third")
    shutil.copytree(folder / "third", folder / "interrupted")
    (folder / "interrupted" / ".writing-0" / "new").mkdir(parents=True)
    (folder / "interrupted" / "model.safetensors").unlink()
    facts["interrupted"] = catch(load, AutoModelForCausalLM, "interrupted")

    row = {"input_ids": idx[0], "labels": idx[0]}
    options = {"report_to": [], "use_cpu": True, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    args, shapes = TrainingArguments(str(folder / "trainer"), **options), lambda p: {"shape": p.predictions.shape}
    trainer = Trainer(model, args, train_dataset=[row] * 8, eval_dataset=[row] * 8, compute_metrics=shapes)
    trainer.train()
    facts["evaluated"] = trainer.evaluate()
    trainer.save_model(str(folder / "trained"))
    with torch.no_grad():
        outputs["third"] = load(AutoModelForCausalLM, "third")(idx).logits
        outputs["again_base"] = load(AutoModel, "again-base")(idx).last_hidden_state
        outputs["trained"] = load(AutoModelForCausalLM, "trained")(idx).logits
        outputs["trained_here"] = model.eval()(idx).logits

    # From here on the package is installed, but this process has already loaded the model as remote code.
    sys.meta_path.remove(BLOCKER)
    sys.path.insert(0, str(Path(__file__).parents[2]))
    late = load(AutoModelForCausalLM, "lm")
    facts["late_module"] = type(late).__module__
    late.to_nanogpt_ckpt(folder / "late" / "ckpt.pt")
    late.save_pretrained(folder / "late")
    facts["local_module"] = type(load(AutoModelForCausalLM, "lm")).__module__

    save_file(outputs, folder / "outputs.safetensors")
    (folder / "facts.json").write_text(json.dumps(facts))


def generate_with_other_caches(model, idx) -> tuple[str, str]:
    """Returns what generate raises if Transformers renames the cache, and if its caches stop working."""
    prepare = GenerationMixin.prepare_inputs_for_generation

    def prepare_renamed(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return {"kv_store" if isinstance(value, Cache) else name: value for name, value in inputs.items()}

    GenerationMixin.prepare_inputs_for_generation = prepare_renamed
    try:
        renamed = catch(model.generate, idx, max_new_tokens=5)
    finally:
        GenerationMixin.prepare_inputs_for_generation = prepare

    inputs, fast = (sys.modules[type(model).__module__.replace("modeling", name)] for name in ("inputs", "fast"))
    newest, update = inputs.NEWEST_TESTED, fast.PreallocatedLayer.update
    inputs.NEWEST_TESTED = (5, 0)
    fast.PreallocatedLayer.update = lambda self, keys, values, *args, **kwargs: (keys, values)
    try:
        broken = catch(model.generate, idx, max_new_tokens=5)
    finally:
        inputs.NEWEST_TESTED, fast.PreallocatedLayer.update = newest, update
    return renamed, broken


def catch(function, *args, **kwargs) -> str:
    try:
        return f"no error: {function(*args, **kwargs)}"
    except (OSError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Compares with nanoGPT itself, if NANOGPT_DIR names a checkout: its model, its train.py and its sample.py.

The scripts run unchanged, in a folder with links to the checkout and a small data set.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hugging_nano_gpt import NanoGPTLMHeadModel, build_character_tokenizer, read_checkpoint, read_meta, write_meta
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from .helpers.comparison import assert_same
from .helpers.programs import run_command
from .helpers.scripts import NANOGPT_DIR, link_scripts, resume_trace, run_script, skip_without_nanogpt
from .helpers.tiny import MODEL_ARGS, make_batch, make_pair
from .helpers.trace import END, START_PATH, STEPS, TOLERANCE, find_largest_difference, load_start, make_trainer

pytestmark = [pytest.mark.nanogpt, skip_without_nanogpt]

# The run that wrote the demo checkpoint, on the CPU.
DEMO_FLAGS = (
    "--out_dir=out --dataset=shakespeare_char --device=cpu --dtype=float32 --compile=False --init_from=resume "
    "--n_layer=3 --n_head=3 --n_embd=96 --block_size=128 --batch_size=4 --gradient_accumulation_steps=1 --bias=False "
    "--eval_iters=1 --log_interval=1 --always_save_checkpoint=True --beta2=0.99"
).split()


@pytest.fixture(scope="module")
def nanogpt():
    """nanoGPT's model.py as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(NANOGPT_DIR) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workplace(tmp_path):
    return make_workplace(tmp_path)


def make_workplace(folder):
    """Makes a folder in which nanoGPT's scripts run: its files, the demo checkpoint, and a character data set."""
    link_scripts(folder)
    data_dir = folder / "data" / "shakespeare_char"
    data_dir.mkdir(parents=True)
    (data_dir / "meta.pkl").write_bytes(META_PATH.read_bytes())
    for split, seed in (("train", 0), ("val", 1)):
        np.random.default_rng(seed).integers(0, 65, 4000, dtype=np.uint16).tofile(data_dir / f"{split}.bin")
    (folder / "out").mkdir()
    (folder / "out" / "ckpt.pt").write_bytes(CKPT_PATH.read_bytes())
    return folder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("length", [1, 7, 32])
def test_model_and_reference_equal_nanogpt_bitwise(nanogpt, bias, dropout, length):
    model, reference = make_pair(bias=bias, dropout=dropout)
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**{**MODEL_ARGS, "bias": bias, "dropout": dropout}))
    theirs.load_state_dict(model.state_dict())
    idx, targets = make_batch(4, length)
    results = []
    for module in (theirs, reference, lambda idx, targets: model(idx, shift_labels=targets).to_tuple()[::-1]):
        torch.manual_seed(3)
        logits, loss = module(idx, targets)
        loss.backward()
        results.append((logits, loss))
    for logits, loss in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(loss, results[0][1])
    for parameter, *others in zip(theirs.parameters(), reference.parameters(), model.parameters(), strict=True):
        assert all(torch.equal(parameter.grad, other.grad) for other in others)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prompt_length", [1, 50, 127, 128, 300])
def test_generated_tokens_equal_nanogpts(nanogpt, bias, prompt_length):
    model, _ = make_pair(bias=bias, block_size=128)
    model.eval()
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**{**MODEL_ARGS, "bias": bias, "block_size": 128})).eval()
    theirs.load_state_dict(model.state_dict())
    idx, _ = make_batch(1, prompt_length)
    tokens = model.generate(idx, max_new_tokens=150, do_sample=False)
    assert torch.equal(tokens, theirs.generate(idx, 150, top_k=1))
    for seed, (temperature, top_k) in enumerate([(0.5, 200), (0.8, 20), (1.4, 5)]):
        settings = {"temperature": temperature, "top_k": top_k}
        torch.manual_seed(seed)
        expected = theirs.generate(idx, 60, **settings)
        for use_cache in (True, False):
            torch.manual_seed(seed)
            tokens = model.generate(idx, max_new_tokens=60, do_sample=True, use_cache=use_cache, **settings)
            assert torch.equal(tokens, expected), (seed, use_cache)


def test_logits_of_uncached_generation_equal_nanogpts_bitwise(nanogpt):
    model, _ = make_pair()
    model.eval()
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**MODEL_ARGS)).eval()
    theirs.load_state_dict(model.state_dict())
    settings = {"use_cache": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(make_batch(1, 5)[0], max_new_tokens=60, do_sample=False, **settings)
    for step, logits in enumerate(output.logits):
        assert torch.equal(logits, theirs(output.sequences[:, : 5 + step][:, -32:])[0][:, -1])


def test_our_checkpoint_loads_as_nanogpt_loads_its_own(nanogpt, tmp_path):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    checkpoint = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**checkpoint["model_args"])).eval()
    theirs.load_state_dict(checkpoint["model"])
    optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    optimizer.load_state_dict(checkpoint["optimizer"])
    idx, targets = make_batch(2, 128)
    assert torch.equal(theirs(idx, targets)[0], model(idx).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # a warning of PEFT
def test_nanogpt_computes_a_merged_adapter(nanogpt, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = make_pair()
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)  # random, not zero
    merged = peft.get_peft_model(model, lora).eval().merge_and_unload()
    merged.to_nanogpt_ckpt(tmp_path / "ckpt.pt", overwrite=True)
    checkpoint = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
    theirs = nanogpt.GPT(nanogpt.GPTConfig(**checkpoint["model_args"])).eval()
    theirs.load_state_dict(checkpoint["model"])
    idx, targets = make_batch(2, 32)
    assert torch.equal(theirs(idx, targets)[0], merged(idx).logits)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """What train.py leaves after three updates, from its own file, from ours, and from ours without moments."""
    state, ends = read_checkpoint(CKPT_PATH).training_state, {}
    for name, optimizer in (("its own", None), ("ours", state.optimizer), ("ours without moments", None)):
        workplace = make_workplace(tmp_path_factory.mktemp("resumed"))
        path = workplace / "out" / "ckpt.pt"
        if name != "its own":
            NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH).to_nanogpt_ckpt(path, optimizer=optimizer, overwrite=True)
        output = run_script(workplace, "train.py", *DEMO_FLAGS, "--max_iters=5003", "--eval_interval=5003")
        ends[name] = output, read_checkpoint(path)
    return ends


@pytest.mark.parametrize(("name", "n_steps"), [("ours", 5003), ("ours without moments", 3)])
def test_train_py_resumes_from_our_checkpoint(resumed, name, n_steps):
    original, (output, found) = read_checkpoint(CKPT_PATH), resumed[name]
    assert "Resuming training from out" in output
    assert "iter 5000: loss" in output
    assert found.training_state.iter_num == 5003
    assert list(found.state_dict) == list(original.state_dict)
    assert not torch.equal(found.state_dict["lm_head.weight"], original.state_dict["lm_head.weight"])
    assert {int(state["step"]) for state in found.training_state.optimizer.moments.values()} == {n_steps}


def test_train_py_resumes_from_ours_as_from_its_own(resumed):
    """The same three updates from nanoGPT's file and from ours end at the same bits, and elsewhere without moments."""
    its_own, ours, without = (resumed[name][1].state_dict for name in ("its own", "ours", "ours without moments"))
    assert_same(ours, its_own)
    assert find_largest_difference(without, its_own) > 100 * TOLERANCE


def test_train_py_goes_on_from_our_updates_as_from_its_own(workplace, two_threads):
    """50 updates of ours and 50 of nanoGPT's after them end at the bits of 100 of nanoGPT's."""
    path = workplace / "out" / "ckpt.pt"
    trainer = make_trainer(workplace / "trainer", load_start(), STEPS[:50])
    trainer.train()
    trainer.save_nanogpt_ckpt(path, overwrite=True)
    assert not torch.equal(trainer.model.lm_head.weight, load_start().lm_head.weight)
    ours = resume_trace(workplace, STEPS[50:])

    path.write_bytes(START_PATH.read_bytes())
    theirs = resume_trace(workplace, STEPS)
    assert ours.training_state.iter_num == theirs.training_state.iter_num == 200
    assert_same(ours.state_dict, theirs.state_dict)
    assert_same(ours.training_state.optimizer.moments, theirs.training_state.optimizer.moments)
    assert find_largest_difference(ours.state_dict, END.state_dict) <= TOLERANCE  # 0.0 where the run was recorded


def test_train_py_goes_on_elsewhere_from_our_updates_without_moments(workplace, two_threads):
    """Shows that the test above can fail."""
    trainer = make_trainer(workplace / "trainer", load_start(), STEPS[:50])
    trainer.train()
    trainer.model.to_nanogpt_ckpt(workplace / "out" / "ckpt.pt", iter_num=150, overwrite=True)
    ours = resume_trace(workplace, STEPS[50:])
    assert find_largest_difference(ours.state_dict, END.state_dict) > 100 * TOLERANCE


def test_sample_py_samples_from_our_checkpoint(workplace):
    flags = "--out_dir=out --device=cpu --dtype=float32 --num_samples=1 --max_new_tokens=20".split()
    theirs = run_script(workplace, "sample.py", *flags)
    NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH).to_nanogpt_ckpt(workplace / "out" / "ckpt.pt", overwrite=True)
    assert run_script(workplace, "sample.py", *flags) == theirs
    assert "Loading meta from" in theirs


def test_sample_py_reads_our_meta(workplace):
    flags = "--out_dir=out --device=cpu --dtype=float32 --num_samples=1 --max_new_tokens=20 --start=ROMEO".split()
    theirs = run_script(workplace, "sample.py", *flags)
    path = workplace / "data" / "shakespeare_char" / "meta.pkl"
    path.unlink()
    write_meta(build_character_tokenizer(read_meta(META_PATH)), path)
    assert run_script(workplace, "sample.py", *flags) == theirs
    assert "Loading meta from" in theirs


@pytest.mark.parametrize("options", [[], ["--temperature=1.1", "--top_k=7", "--seed=3"]])
def test_command_generate_prints_what_sample_py_prints(workplace, options):
    common = ["--num_samples=2", "--max_new_tokens=200", *options]
    theirs = run_script(workplace, "sample.py", "--out_dir=out", "--device=cpu", "--dtype=float32", *common)
    ours = run_command("generate", "out/ckpt.pt", *(flag.replace("_", "-") for flag in common), cwd=workplace).stdout
    assert ours.count("---------------") == 2
    assert theirs.endswith(ours)  # it says more before

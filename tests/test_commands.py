"""The commands convert, back, export, inspect and generate: output, errors, exit codes."""

import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2LMHeadModel

from hugging_nano_gpt import (
    CheckpointError,
    ConversionError,
    DataError,
    NanoGPTLMHeadModel,
    TokenizerError,
    build_tiktoken_tokenizer,
    convert_to_checkpoint,
    convert_to_folder,
    inspect_path,
    read_checkpoint,
    read_meta,
    sample_text,
)
from hugging_nano_gpt.convert.source import load_source
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.sample import page
from hugging_nano_gpt.sample.sampling import make_sampler
from hugging_nano_gpt_cli import program

from .helpers.comparison import assert_same
from .helpers.encodings import make_encoding
from .helpers.programs import PROGRAM, run_command, run_program
from .helpers.reference import ReferenceGPT
from .helpers.tiny import make_model
from .helpers.trace import TRACE_DIR

DOCS_DIR = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    "command",
    ["convert", "back", "export", "inspect", "verify", "evaluate", "generate", "playground", "serve", "demo"],
)
def test_help_of_each_command_names_its_arguments(command):
    result = run_command(command, "--help")
    assert run_command(command, "-h") == result
    assert (result.returncode, result.stderr) == (0, "")
    assert f"hugging-nano-gpt {command}" in result.stdout


def test_convert_and_back_are_bitwise(tmp_path):
    result = run_command("convert", CKPT_PATH, tmp_path / "folder", "--meta", META_PATH, "--max-shard-size", "1MB")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(
        f"Wrote {tmp_path / 'folder'}: 350,976 parameters, float32, and a tokenizer of 65 "
    )
    result = run_command("back", tmp_path / "folder", tmp_path / "out" / "ckpt.pt")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        f"Wrote {tmp_path / 'out' / 'ckpt.pt'}: 350,976 parameters, iteration 5,000, a fresh optimizer state\n"
    )
    before, after = (read_checkpoint(path, with_optimizer=False) for path in (CKPT_PATH, tmp_path / "out" / "ckpt.pt"))
    assert_same(dict(after.state_dict), dict(before.state_dict))
    assert after.training_state == before.training_state


def test_convert_refuses_to_overwrite_without_force(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run_command("convert", CKPT_PATH, tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(rf"error: {tmp_path}: is not empty: .*--force.*\n", result.stderr)
    result = run_command("convert", CKPT_PATH, tmp_path, "--force", "--dtype", "bfloat16", "--activation", "gelu_new")
    assert result.returncode == 0
    assert "no tokenizer found" in result.stdout
    found = inspect_path(tmp_path)
    assert (found.dtypes, found.model_config.activation_function) == (("bfloat16",), "gelu_new")


def test_export_to_gpt2_writes_what_stock_gpt2_loads(tmp_path):
    folder = tmp_path / "gpt2"
    result = run_command("export", CKPT_PATH, folder, "--to", "gpt2", "--meta", META_PATH, "--dtype", "bfloat16")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"Wrote {folder}: 350,976 parameters, bfloat16, and a tokenizer of 65 tokens",
        "  assumed: exact GELU, as nanoGPT computes since 2023-06-14: the file does not record it",
        "  biases are zeros, as GPT-2 always has them: for inference only, because they would train",
    ]
    stock = GPT2LMHeadModel.from_pretrained(folder)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, dtype="bfloat16")
    idx = torch.arange(65)[None]
    # float: bfloat16 rounds more than the order of the sums differs
    torch.testing.assert_close(stock.float()(idx).logits, model.float()(idx).logits, rtol=0, atol=1e-5)
    result = run_command("export", CKPT_PATH, folder, "--to", "gpt2")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(rf"error: {folder}: is not empty: .*--force.*\n", result.stderr)
    assert run_command("export", CKPT_PATH, folder, "--to", "gpt2", "--force").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


def test_inspect_prints_for_people_and_as_json():
    result = run_command("inspect", CKPT_PATH)
    assert (result.returncode, result.stdout) == (0, f"{inspect_path(CKPT_PATH)}\n")
    result = run_command("inspect", CKPT_PATH, "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(inspect_path(CKPT_PATH).to_json()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "missing.pt"], "missing.pt: cannot be opened"),
        (["back", "missing", "ckpt.pt"], "missing: cannot be loaded"),
        (["export", "missing.pt", "out", "--to", "gpt2"], "missing.pt: cannot be opened"),
        (["generate", str(CKPT_PATH), "hello", "--meta", "missing.pkl"], "missing.pkl: cannot be opened"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_take_one_line_and_no_traceback(arguments, message, tmp_path):
    result = run_command(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda:99", "xpu:9", "meta", "gpu", ""])
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_missing_device_gives_an_error_of_one_line(command, device, tmp_path):
    np.zeros(400, dtype=np.uint16).tofile(tmp_path / "val.bin")
    result = run_command(command, CKPT_PATH, "a" if command == "generate" else tmp_path, "--device", device)
    assert (result.returncode, result.stdout) == (1, "")
    message = rf"error: device: expected one on which torch .* computes here, cpu.*, got '{device}'; give one .*\n"
    assert re.fullmatch(message, result.stderr)


def test_missing_gpu_gives_an_error_of_one_line():
    result = run_command("generate", CKPT_PATH, "a", "--device", "cuda:99")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        r"error: device: expected one on .* here, cpu.*, got 'cuda:99'; give one of these.*\n", result.stderr
    )


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_closed_stream_counts_as_an_empty_one(closed):
    arguments = ("generate", CKPT_PATH, "--meta", META_PATH, "--num-samples", "1", "--max-new-tokens", "5")
    expected = run_command(*arguments)
    assert expected.returncode == 0
    assert run_command(*arguments, closed=closed) == expected._replace(**{closed: ""} if closed == "stdout" else {})


def test_error_with_a_closed_stderr_stays_out_of_stdout():
    assert run_command("inspect", "missing.pt", closed="stderr") == (1, "", "")


# Runs commands as `python -m` starts them, one after the other, without the modules that are named.
RUN_WITHOUT = """
import json, runpy, sys
names, commands = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(names))  # None: cannot be imported
for sys.argv[1:] in commands:
    try:
        runpy.run_module("hugging_nano_gpt", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("ended with", end.code)
"""


def test_program_without_clients_misses_none_and_ends_with_one_line_on_stderr(tmp_path):
    """A process of its own prints only the line, and does not import what only other commands need, which is slow."""
    names = "accelerate bitsandbytes lm_eval peft torchao datasets fastapi gguf gradio onnx tiktoken".split()
    names += ["transformers.trainer", "transformers.models.gpt2.modeling_gpt2"]
    np.arange(200, dtype=np.uint16).clip(0, 64).tofile(tmp_path / "val.bin")
    commands = [["evaluate", CKPT_PATH, tmp_path, "--meta", META_PATH], ["inspect", tmp_path / "missing.pt"]]
    arguments = json.dumps(names), json.dumps(commands, default=str)
    result = run_program(sys.executable, "-c", RUN_WITHOUT, *arguments)
    assert re.fullmatch(r".*bits per character.*\nended with 0\nended with 1\n", result.stdout, re.DOTALL)
    assert re.fullmatch(rf"error: {tmp_path}/missing\.pt: cannot be opened: .*\n", result.stderr)


def test_train_without_accelerate_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for module in ("run", "sharding", "trainer"):
        monkeypatch.delitem(sys.modules, f"hugging_nano_gpt.training.{module}", raising=False)
    result = run_command("train")
    assert result == (1, "", "error: training: accelerate is not installed; pip install accelerate\n")


def test_debug_lets_the_error_through_for_its_traceback(tmp_path):
    with pytest.raises(CheckpointError, match=r"^missing\.pt: cannot be opened"):
        run_command("--debug", "inspect", "missing.pt", cwd=tmp_path)
    assert run_command("inspect", "missing.pt", cwd=tmp_path).returncode == 1  # the next command sets it again


def test_error_that_is_not_ours_takes_one_line_too(monkeypatch):
    monkeypatch.setattr(program, "set_up_transformers", lambda **_: 1 / 0)
    result = run_command("demo")
    assert result == (1, "", "error: ZeroDivisionError: division by zero; --debug shows where\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "a", "b", "--dtype", "int8"],
        ["export", "a", "b"],
        ["export", "a", "b", "--to", "gpt3"],
        ["inspect", "a", "b"],
        ["generate", "a", "--top-k", "-1"],
        ["playground", "a", "--port", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments):
    assert run_command(*arguments).returncode == 2


def sample(*args, **kwargs):
    stream = io.StringIO()
    sample_text(*args, stream=stream, **kwargs)
    return stream.getvalue()


def test_generate_prints_what_sample_text_does(tmp_path):
    convert_to_folder(CKPT_PATH, tmp_path / "folder", meta_path=META_PATH)
    options = ("--num-samples", "2", "--max-new-tokens", "140", "--seed", "5", "--top-k", "0", "--temperature", "0.9")
    expected = sample(
        tmp_path / "folder", "ROMEO:", num_samples=2, max_new_tokens=140, seed=5, top_k=0, temperature=0.9
    )
    result = run_command("generate", tmp_path / "folder", "ROMEO:", *options)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", expected)
    result = run_program(PROGRAM, "generate", CKPT_PATH, "--meta", META_PATH, *options, text="ROMEO:")
    assert (result.returncode, result.stderr, result.stdout) == (0, "", expected)
    assert expected.count("ROMEO:") >= 2


def seed_as_sample_py(seed):
    """Makes a GPT of the demo's shape as nanoGPT does, in plain torch, after seeding."""
    torch.manual_seed(seed)
    model = ReferenceGPT(block_size=128, vocab_size=65, n_layer=3, n_head=3, n_embd=96, dropout=0.0, bias=False)
    parameters = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    parameters += [model.lm_head.weight]  # tied, so it is initialized twice
    parameters += [p for name, p in model.named_parameters() if name.endswith("c_proj.weight")]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)


def test_sampled_text_is_what_the_model_samples(tmp_path):
    model, table = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH), read_meta(META_PATH)
    seed_as_sample_py(1337)
    expected = ""
    for _ in range(3):
        tokens = model.generate(
            torch.tensor([table.encode("\n")]), max_new_tokens=150, do_sample=True, temperature=0.8, top_k=200
        )
        expected += table.decode(tokens[0].tolist()) + "\n---------------\n"
    assert sample(CKPT_PATH, num_samples=3, max_new_tokens=150, meta_path=META_PATH) == expected


def test_sampled_text_is_written_as_it_is_sampled():
    class Stream(io.StringIO):
        n_flushes = 0

        def flush(self):
            self.n_flushes += 1

    stream = Stream()
    sample_text(CKPT_PATH, num_samples=1, max_new_tokens=100, meta_path=META_PATH, stream=stream)
    assert stream.n_flushes > 10


@pytest.fixture
def ending(tmp_path):
    """A folder with a model that only ever samples the end token."""
    tokenizer = build_tiktoken_tokenizer(make_encoding())
    model = make_model(vocab_size=len(tokenizer), n_layer=1)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[tokenizer.eos_token_id] = 9.0
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "ending")
    return tmp_path / "ending"


def test_sampling_stops_at_the_end_token_unless_told_to_ignore_it(ending):
    arguments = ("generate", ending, "a", "--num-samples", "2", "--max-new-tokens", "9")
    result = run_command(*arguments)
    assert (result.stdout, result.stderr) == ("a<|endoftext|>\n---------------\n" * 2, "")
    result = run_command(*arguments, "--ignore-eos")  # as sample.py
    assert (result.stdout, result.stderr) == (f"a{'<|endoftext|>' * 9}\n---------------\n" * 2, "")


def test_page_ends_with_the_end_token(ending, monkeypatch):
    monkeypatch.setattr(page, "_INTERVAL_S", 1e9)
    settings = {"temperature": 0.8, "top_k": 200, "seed": 1}
    *_, (text, _, progress) = page.show_steps(make_sampler(load_source(ending)), "a", max_new_tokens=9, **settings)
    assert "&lt;|endoftext|&gt;</div>" in text
    assert progress.startswith("1 of 9 tokens, ")


def test_settings_of_a_folder_do_not_change_what_is_sampled(tmp_path):
    convert_to_folder(CKPT_PATH, tmp_path, meta_path=META_PATH)
    expected = sample(tmp_path, num_samples=1, max_new_tokens=60)
    settings = {"do_sample": True, "top_p": 0.1, "repetition_penalty": 1.5, "eos_token_id": 1}
    GenerationConfig(**settings).save_pretrained(tmp_path)
    assert NanoGPTLMHeadModel.from_pretrained(tmp_path).generation_config.top_p == 0.1
    assert sample(tmp_path, num_samples=1, max_new_tokens=60, ignore_eos=True) == expected
    ended = sample(tmp_path, num_samples=1, max_new_tokens=60)
    assert ended == expected[: expected.index(" ") + 1] + "\n---------------\n"  # token 1 is the space


def test_temperature_zero_always_selects_the_likeliest_token():
    result = run_command(
        "generate",
        CKPT_PATH,
        "ROMEO:",
        "--meta",
        META_PATH,
        *"--temperature 0 --num-samples 2 --max-new-tokens 140".split(),
    )
    model, table = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH), read_meta(META_PATH)
    idx = torch.tensor([table.encode("ROMEO:")])
    text = table.decode(model.generate(idx, max_new_tokens=140, do_sample=False)[0].tolist())
    assert result.stdout == f"{text}\n---------------\n" * 2


def test_prompt_is_read_from_a_file_as_sample_py_does(tmp_path):
    (tmp_path / "start.txt").write_bytes(b"ROMEO:\r\nI")
    settings = {"num_samples": 1, "max_new_tokens": 20, "meta_path": META_PATH}
    assert sample(CKPT_PATH, f"FILE:{tmp_path / 'start.txt'}", **settings) == sample(
        CKPT_PATH, "ROMEO:\nI", **settings
    )
    with pytest.raises(DataError, match=r"missing\.txt: cannot be opened: No such file"):
        sample(CKPT_PATH, "FILE:missing.txt", **settings)


def test_back_takes_moments_and_a_best_val_loss(tmp_path):
    path = TRACE_DIR / "ckpt_200.pt"
    convert_to_folder(path, tmp_path / "folder")
    out = tmp_path / "ckpt.pt"
    result = run_command("back", tmp_path / "folder", out, "--optimizer-from", path, "--best-val-loss", "1e9")
    assert result.stdout.endswith(f"iteration 200, the optimizer state of {path}\n")
    before, after = read_checkpoint(path).training_state, read_checkpoint(out).training_state
    assert after.best_val_loss == 1e9
    assert_same(after.optimizer.moments, before.optimizer.moments)
    assert after.optimizer.settings == before.optimizer.settings


def test_back_refuses_moments_that_do_not_fit(tmp_path):
    convert_to_folder(CKPT_PATH, tmp_path / "folder")
    convert_to_checkpoint(tmp_path / "folder", tmp_path / "fresh.pt")
    for optimizer_from, message in (
        (TRACE_DIR / "ckpt_200.pt", "optimizer: "),
        (tmp_path / "fresh.pt", "fresh.pt: has no optimizer state: expected AdamW's moments, got none"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert_to_checkpoint(tmp_path / "folder", tmp_path / "ckpt.pt", optimizer_from=optimizer_from)
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize(("prompt", "message"), [("R\xd6MEO", "of the model's 65, got '\xd6'"), ("", "at least one")])
def test_prompt_that_cannot_be_read_is_refused(prompt, message):
    with pytest.raises(TokenizerError, match=message):
        sample(CKPT_PATH, prompt, meta_path=META_PATH)


def test_cli_md_is_what_the_program_says():
    spec = importlib.util.spec_from_file_location("make_cli", DOCS_DIR / "make_cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS_DIR / "cli.md").read_text()
    assert page == module.make_page(), "run: python docs/make_cli.py"
    help_pages = {command: run_command(command, "--help").stdout for command in re.findall(r"^## (\w+)", page, re.M)}
    for command, section in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S):
        for option in re.findall(r"`(--[\w-]+)", section):
            assert option in help_pages[command]

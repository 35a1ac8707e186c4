# make demo | make test | make check. Everything is installed into .venv; nothing needs root, Docker or a GPU.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name) 2>/dev/null)) no-python-3.11-or-3.12-found)
BIN := .venv/bin
DATA ?= digits
TEST_PROCESSES ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test quick soak check format clean

.venv/.installed: pyproject.toml clients/pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("Python %d.%d found; Covae needs 3.11 or 3.12: make PYTHON=/path/to/python3.11" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable clients --editable ".[dev]"
	touch $@

demo: .venv/.installed ## the main job on real images: train, export, serve, sample, edit, score; leaves demo/index.html
	exec $(BIN)/covae demo --data $(DATA)

test: .venv/.installed ## every test, the slow ones against a real Triton too
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES)

quick: .venv/.installed ## the tests that are not marked slow
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) -m "not slow"

soak: .venv/.installed ## tests/soak in full, three quarters of an hour; leaves bench/reliability.json
	COVAE_SOAK=1 $(BIN)/python -m pytest tests/soak -s

check: .venv/.installed ## ruff, mypy --strict, both wheels, and every module from a clean environment
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m tests.check_wheels

format: .venv/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove demo/, dist/, runs/ and every exported model, but not the environment
	rm -rf demo runs dist
	find model_repository -mindepth 1 ! -name README.md -delete

# Every target makes what it needs: `make demo` and `make test` on a fresh machine are all that is to be done.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := rnn tests bench examples

.PHONY: demo test examples check matrix lint bench gpu docs docs-serve dist clean

demo: .venv/demo
	$(BIN)/python examples/language_model.py --compare

test: .venv/test
	$(BIN)/python -m pytest -q -m "not slow and not examples" --numprocesses 2 --dist worksteal

# Each example, small and for seconds; their data comes from the package index.
examples: .venv/test
	$(BIN)/python -m pytest -q -m examples --numprocesses 2 --dist worksteal

check: .venv/test
	$(BIN)/python -m pytest -q --cases 2000

# The tests with other versions, each in an environment of its own: see the file. Downloads gigabytes.
matrix:
	$(PYTHON) tests/project/matrix.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/mypy $(SOURCES)

bench: .venv/test
	$(BIN)/python bench/run.py

# Installs and fetches nothing: with the PyTorch, Triton and CuPy that the machine has.
gpu:
	$(PYTHON) bench/prove.py

# The site, in site/: a warning is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The source distribution, and the wheel that is made of it, tried where there is no source tree.
dist: .venv/dist
	rm -rf dist .venv-dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	.venv-dist/bin/python -I tests/project/try_wheel.py
	rm -rf .venv-dist

clean:
	rm -rf .venv .venv-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[examples]"
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@ .venv/demo

.venv/docs: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

.venv/dist: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dist]"
	touch $@

# Each target sets up what it needs, from nothing: `make demo`, `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint peer bench

.venv/.ready: pyproject.toml constraints.txt $(wildcard tests/plugin/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]" ./tests/plugin
	touch $@

demo: .venv/.ready
	$(BIN)/qconvert golden/tiny+golden/tiny-lora --to gguf --bits 4 -o tiny.gguf --force
	$(BIN)/python tools/say.py tiny.gguf "A class is"

test: .venv/.ready lint
	$(BIN)/python -m pytest -n 2 -m "not peer"

lint: .venv/.ready
	$(BIN)/ruff check
	$(BIN)/mypy -p qconvert

peer: .venv/.ready
	$(BIN)/python -m pytest -n 2 -m peer

bench: .venv/.ready
	$(BIN)/python tools/bench.py

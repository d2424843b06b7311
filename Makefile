# make demo    install into .venv and train the hybrid on the embedded digits
# make test    install into .venv and run every test
# make lint    formatting and static checks
# make bench   time and memory against what else there is; writes bench/results and docs/speed.md (a quarter of an hour)
# make bench-check [BASE=FILE] [NEW=FILE] [TOLERANCE=0.15]   what got slower between two result files
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: help demo test lint bench bench-check clean prerequisites

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/installed
	$(BIN)/python examples/digits_demo.py

# The best instruction set runs with everything else, the others run the kernel tests. The interpreter and the
# ahead-of-time compiler of Triton cannot share a process with each other.
test: $(VENV)/installed
	$(BIN)/python -m pytest -q tests --ignore=tests/aot
	set -e; others=$$($(BIN)/python -c "from hsv_kernels import _C; print(*_C.cpu_isas()[1:])"); \
	for isa in $$others; do HSV_CPU_ISA=$$isa $(BIN)/python -m pytest -q tests/kernels; done
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels
	$(BIN)/python -m pytest -q tests/aot

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: $(VENV)/installed
	$(BIN)/python -m bench $(if $(QUICK),--quick)

bench-check: $(VENV)/installed
	$(BIN)/python -m bench.check $(if $(BASE),--base $(BASE)) $(if $(NEW),--new $(NEW)) $(if $(TOLERANCE),--tolerance $(TOLERANCE))

clean:
	rm -rf $(VENV) build dist *.egg-info hsv_kernels/_C*.so

$(VENV)/installed: $(SOURCES)
	@$(MAKE) --no-print-directory prerequisites
	@test -x $(BIN)/python || { echo "Making the virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing hsv and what it needs (PyTorch is several GB; this can take minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -e '.[train,dev]'
	@$(BIN)/python -c "import hsv_kernels; print(hsv_kernels.backends())"
	@touch $@

prerequisites:
	@command -v $(PYTHON) >/dev/null || { echo "hsv needs Python 3.11 or newer: apt install python3"; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "hsv needs Python 3.11 or newer and found $$($(PYTHON) --version); name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || { echo "Python's venv module is missing: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c "import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path('include') + '/Python.h'))" \
		|| { echo "Python's headers are missing: apt install python3-dev"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || command -v clang++ >/dev/null \
		|| { echo "A C++17 compiler is missing: apt install g++"; exit 1; }

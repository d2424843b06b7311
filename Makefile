# make demo         install into .venv and train the hybrid on the embedded digits
# make test         install into .venv and run the tests [JOBS=2 groups at a time]
# make aot          every Triton kernel for every architecture; `make test` compiles each for one of them
# make aot-table    measure registers, stack, shared memory and instructions of each Triton kernel (docs/kernels/resources.md)
# make aot-oldest   the Triton kernels with the oldest triton and torch that are supported, in an environment of its own
# make sanitize     run the CPU kernels' tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make lint         formatting and static checks
# make bench        time and memory against what else there is (three quarters of an hour; QUICK=1: small sizes, nothing kept)
# make bench-check  what got slower between two result files [BASE=FILE] [NEW=FILE] [TOLERANCE=0.15]
# make methods      train each method's small preset on a folder of images and write docs/methods.md: DATA=FOLDER
#                   [MINUTES=5|STEPS=500] [METHODS=simclr,mae] [THREADS=2] [JOBS=1]
# make gpu          prove and measure the kernels on a GPU [PART=test|contrast|memory-bound|end-to-end] [FULL=1]
#                   [RESULTS=FOLDER] [GPU_PYTHON=python3, whose packages are used as they are: nothing is installed]
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# What hsv_kernels.compat is compared with; without dependencies, of which the losses need none beyond ours.
ORIGINALS := lightly==1.6.* pytorch-metric-learning==2.9.*
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: help demo test test-kernels test-above-kernels test-ahead-of-time test-interpreted aot aot-table aot-oldest sanitize lint bench bench-check methods gpu clean prerequisites

help:
	@sed -n '/^# /!q; s/^# //p' Makefile

demo: $(VENV)/installed
	$(BIN)/python examples/digits_demo.py

# Groups of tests side by side, JOBS at a time, the longest first: Triton's interpreter, which is one thread and cannot share
# a process with the compiler; what is compiled ahead of time; the best instruction set's kernels; everything above the
# kernels; and the kernels with each other instruction set.
test: $(VENV)/installed
	others=$$($(BIN)/python -c "from hsv_kernels import _C; print(*_C.cpu_isas()[1:])"); \
	OMP_WAIT_POLICY=passive $(MAKE) --no-print-directory -j $(or $(JOBS),2) test-interpreted test-ahead-of-time test-kernels \
		test-above-kernels $$(for isa in $$others; do echo test-kernels-on-$$isa; done)

test-kernels:
	$(BIN)/python -m pytest -q tests/kernels

test-above-kernels:
	$(BIN)/python -m pytest -q tests --ignore=tests/kernels --ignore=tests/aot

test-ahead-of-time:
	$(BIN)/python -m pytest -q -m "not slow" tests/aot

test-interpreted:
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels

test-kernels-on-%:
	HSV_CPU_ISA=$* $(BIN)/python -m pytest -q -m "not slow" tests/kernels

aot: $(VENV)/installed
	$(BIN)/python -m pytest -q tests/aot

aot-table: $(VENV)/installed
	$(BIN)/python -m tests.aot.table

# The compiled module is the one that stands beside the sources: it takes plain pointers and serves every torch.
aot-oldest: $(VENV)/installed $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -q tests/aot
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q tests/kernels

# Each sanitizer has a build of the package of its own, which the tests import in place of the installed one. gcc's
# runtime must be the first library of the process, and libstdc++ be there when it looks for __cxa_throw. ThreadSanitizer
# knows nothing of libgomp's barriers: its build brings teams of its own, OMP_THREAD_LIMIT keeps torch from making any, and
# tests of libgomp itself are left out.
SANITIZED_BUILD = CXX=g++ HSV_BUILD_CUDA=0 HSV_BUILD_TYPE=RelWithDebInfo $(BIN)/python setup.py -q build
SANITIZED_TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --capture=sys -p no:cacheprovider \
	-m "not slow" -k "not compiles" tests/kernels
PRELOAD = LD_PRELOAD="$$(g++ -print-file-name=$(1)) $$(g++ -print-file-name=libstdc++.so.6)"

sanitize: $(VENV)/installed
	HSV_CMAKE_ARGS=-DHSV_SANITIZE=address,undefined,float-cast-overflow \
		$(SANITIZED_BUILD) --build-base build/asan --build-lib build/asan
	set -e; for isa in $$($(BIN)/python -c "from hsv_kernels import _C; print(*_C.cpu_isas())"); do \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 HSV_CPU_ISA=$$isa $(call PRELOAD,libasan.so) \
		$(SANITIZED_TEST) -o pythonpath=build/asan; done
	HSV_CMAKE_ARGS=-DHSV_SANITIZE=thread $(SANITIZED_BUILD) --build-base build/tsan --build-lib build/tsan
	HSV_CPU_ISA=$$($(BIN)/python -c "from hsv_kernels import _C; print(_C.cpu_isa())") \
		OMP_THREAD_LIMIT=1 TSAN_OPTIONS="halt_on_error=1 die_after_fork=0" $(call PRELOAD,libtsan.so) \
		$(SANITIZED_TEST) -k "not compiles and not inside_a_parallel_region and not torch_decides" -o pythonpath=build/tsan

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: $(VENV)/installed
	$(BIN)/python -m bench $(if $(QUICK),--quick)

bench-check: $(VENV)/installed
	$(BIN)/python -m bench.check $(if $(BASE),--base $(BASE)) $(if $(NEW),--new $(NEW)) $(if $(TOLERANCE),--tolerance $(TOLERANCE))

methods: $(VENV)/installed
	@test -n '$(DATA)' || { echo "DATA names a folder of labelled images: make methods DATA=FOLDER"; exit 1; }
	$(BIN)/python -m bench.methods --data '$(DATA)' $(if $(MINUTES),--minutes $(MINUTES)) $(if $(STEPS),--steps $(STEPS)) \
		$(if $(METHODS),--methods '$(METHODS)') $(if $(THREADS),--threads $(THREADS)) $(if $(JOBS),--jobs $(JOBS))

gpu: $(if $(GPU_PYTHON),,$(VENV)/installed)
	$(or $(GPU_PYTHON),$(BIN)/python) -m bench.gpu $(if $(PART),--part $(PART)) $(if $(FULL),--full) \
		$(if $(RESULTS),--results $(RESULTS))

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info hsv_kernels/_C*.so

$(VENV)/installed: $(SOURCES)
	@$(MAKE) --no-print-directory prerequisites
	@test -x $(BIN)/python || { echo "Making the virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing hsv and what it needs (PyTorch is several GB; this can take minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -e '.[train,dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q --no-deps $(ORIGINALS) \
		|| echo "$(ORIGINALS): not installed; their tests in tests/compat are skipped"
	@$(BIN)/python -c "import hsv_kernels; print(hsv_kernels.backends())"
	@touch $@

# The interpreter of triton 3.6 breaks with numpy 2.4.
$(OLDEST)/installed:
	@$(MAKE) --no-print-directory prerequisites
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q \
		'torch==2.11.*' 'triton==3.6.*' 'numpy<2.4' 'pytest>=8'
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

# Everything runs in .venv, which the first call makes; python3, a C++20 compiler and make suffice.
#   PYTHON=python3.12   another interpreter for .venv
#   CONSTRAINTS=        without the pinned versions
#   MAX_JOBS, MFEF_CUDA, MFEF_CPU_ISA, TORCH_CUDA_ARCH_LIST: see setup.py
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py
# What shapes a build without being a file; kept in one, so that a change of it builds again.
SETTINGS := MFEF_CUDA=$(MFEF_CUDA) MFEF_CPU_ISA=$(MFEF_CPU_ISA) ARCHS=$(TORCH_CUDA_ARCH_LIST) CXX=$(CXX)

.DELETE_ON_ERROR:
.PHONY: help build demo test test-torch-versions test-processors bench lint format clean distclean FORCE

help:
	@echo "make demo    train two students on real images, time the layer, say where the pictures are"
	@echo "make test    all tests, and the operator tests of the wheel under a second torch"
	@echo "make test-torch-versions   the wheel under every other torch that is promised (3 GB each)"
	@echo "make test-processors       the numerical tests with the instructions of other processors"
	@echo "make bench   the whole kernel benchmark (five minutes on two cores)"
	@echo "make lint    ruff, mypy, clang-format; make format repairs what can be repaired"
	@echo "make build   the package in place, for development"
	@echo "make clean   removes what a build made; make distclean the environments too"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.10; set PYTHON to one that is not." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv." >&2; exit 1; }

# First what a build without isolation needs, then the rest beside the package itself.
$(VENV)/.needs: constraints.txt pyproject.toml | $(BIN)/python
	$(PIP) install --quiet $(CONSTRAINTS) setuptools cmake ninja pybind11 torch numpy
	@touch $@

$(VENV)/.settings: FORCE | $(BIN)/python
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

$(VENV)/.built: $(NATIVE) mfef_ext/version.py $(VENV)/.needs $(VENV)/.settings
	$(PIP) install --quiet --no-build-isolation $(CONSTRAINTS) -e '.[dev]'
	@touch $@

build: $(VENV)/.built

demo: build
	@mkdir -p .demo
	@out=.demo/$$(date +%Y%m%d-%H%M%S) && \
	  $(BIN)/mfef train --out $$out && \
	  $(BIN)/python benchmarks/bench_fusion.py --quick --out $$out/bench && \
	  echo "Pictures:" && find $$out -name '*.png'

# Two processes with one thread each keep two cores busy; tests that need more threads ask for them.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python scripts/check_second_torch.py

# What else the README promises, before a release: see docs/torch_versions.md.
TORCH_VERSIONS ?= 2.10.0 2.11.0 2.12.1 2.14.1
test-torch-versions: build
	$(BIN)/python scripts/check_second_torch.py --delete --torch $(TORCH_VERSIONS)

# Processors whose instructions this one has too, and other numbers of threads. Who adds in what order
# depends on them: our kernels, oneDNN, ATen, MKL, OpenBLAS (numpy, and Triton's interpreter with it).
PROCESSORS := sse avx avx2
sse := MFEF_USE_ISA=baseline ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default \
  MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Prescott OMP_NUM_THREADS=3
avx := MFEF_USE_ISA=baseline ONEDNN_MAX_CPU_ISA=AVX ATEN_CPU_CAPABILITY=default \
  MKL_CBWR=AVX OPENBLAS_CORETYPE=Sandybridge OMP_NUM_THREADS=1
avx2 := MFEF_USE_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
  MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=2
NUMERICAL := tests/ops tests/test_modules.py tests/test_export.py tests/distill \
  tests/train/test_steps.py tests/train/test_methods.py \
  $(patsubst %,tests/backends/triton/test_%.py,conv attention kd kd_step ops)

# More threads than cores: they sleep while they wait for each other.
test-processor-%: build
	$($*) OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal $(NUMERICAL)

test-processors: $(PROCESSORS:%=test-processor-%)

bench: build
	$(BIN)/python benchmarks/bench_fusion.py

SOURCES := $(shell find csrc tests/ptx -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf build dist *.egg-info mfef_ext/*.so $(VENV)/.built .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mfef_ext tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv-torch*

# On a fresh machine with Python 3.10 or newer and a C++ compiler: `make demo`, or `make test`.
# Where torch should be another build, name it: make setup TORCH=torch==2.12.0
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# exact, because a looser request may fetch gigabytes of CUDA packages
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
# Triton 3.6's interpreter does not run under NumPy 2.4
NUMPY ?= numpy<2.4

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
NATIVE := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/*/*.map)

# the environment's cmake, ninja and clang-format go first
export PATH := $(abspath $(VENV)/bin):$(PATH)

.PHONY: demo setup tools build lint types test sanitize package docs compile-check bench gpu gpu-ahead gpu-rest clean
.NOTPARALLEL:

demo: setup  # the main job: a trained model, dense and cached, side by side
	$(VENV)/bin/tokencache demo

setup: $(VENV)/.installed  # an environment with the package, editable, its library and a demo

$(VENV)/.installed: Makefile pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*) $(NATIVE)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed')"
	$(PY) -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77" cmake ninja pybind11
	$(PIP) --no-build-isolation --editable ".[demo]" "$(TRITON)" "$(NUMPY)"
	@# pip keeps to itself what setup.py says when it leaves the native library out
	@$(PY) -c "import torch; from tokencache_kernels.backends import native; \
	print('native library:', native.unavailable(torch.device('cpu'), torch.float32) or 'built')"
	@touch $@

tools: $(VENV)/.tools  # the linters, the test runner and the neighbours that the tests need

$(VENV)/.tools: $(VENV)/.installed
	@# the library lies there already
	TOKENCACHE_SKIP_NATIVE=1 $(PIP) --no-build-isolation --editable ".[demo,dev]" "$(TRITON)" "$(NUMPY)"
	@touch $@

build: setup  # the native library alone, for work on csrc/
	cmake --fresh -S . -B build -G Ninja -DPython_EXECUTABLE=$(abspath $(PY)) -DTOKENCACHE_DEVELOPER=ON
	cmake --build build
	cmake --install build --prefix .

lint: tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $(filter-out %.map,$(NATIVE)) tests/c_api/*.c tests/c_api/*.cpp examples/c_api/*.cpp \
	  $(filter %.h %.cpp %.cu %.cuh,$(wildcard tests/cuda_emulator/* tests/cuda_emulator/*/*))

types: tools
	$(PY) -m mypy

compile-check: setup  # every Triton kernel and launch setting, for every architecture; needs no GPU
	$(PY) -m tokencache_kernels compile-report --arch all --check --cache build/compile-gate.json

# pytest last: its summary is the last line
test: lint types compile-check  # everything that needs no GPU
	@# a worker has died twice without a word in some ten thousand tests: what failed runs once more, alone
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 || OMP_NUM_THREADS=1 $(PY) -m pytest --last-failed --last-failed-no-failures none

# Python loads AddressSanitizer first; and libstdc++, whose exceptions it must find from the start.
ASAN = $(foreach name,libasan.so libstdc++.so,$(shell $${CXX:-c++} -print-file-name=$(name)))
sanitize: tools  # the C++ tests under ASan + UBSan and under TSan, the fuzz and CUDA's under ASan
	for preset in asan tsan; do \
	  cmake --preset $$preset && cmake --build --preset $$preset && ctest --preset $$preset || exit 1; \
	done
	LD_PRELOAD="$(ASAN)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	TOKENCACHE_C_LIBRARY=build/asan/libtokencache.so TOKENCACHE_FUZZ_EXAMPLES=1000 \
	  $(PY) -m pytest tests/c_api/test_fuzz.py -s -k hostile
	LD_PRELOAD="$(ASAN)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 CXXFLAGS=-fsanitize=address \
	  $(PY) -m pytest tests/backends/test_cuda_kernels.py -s

package: tools  # the wheel, by way of the sdist, in a fresh environment
	$(PY) -m pytest tests/fresh_environment.py

docs: tools  # the site, in build/site; a warning is an error
	$(PY) -m mkdocs build --strict

bench: tools
	$(PY) -m pytest benchmarks --benchmark-only

# For fifteen minutes with a GPU: `make gpu-ahead` before, on any machine; then `make gpu`, which is
# two calls of at most six minutes, the most valuable first; `make gpu-rest` if time is left. They
# install nothing: PY names a Python that has a CUDA build of torch, Triton and pytest
# (make gpu PY=python3); a wheel of diffusers in build/wheels is unpacked.
gpu-ahead:
	$(PY) -m benchmarks.lease ahead

gpu:
	$(PY) -m benchmarks.lease first; first=$$?; $(PY) -m benchmarks.lease second && exit $$first

gpu-rest:
	$(PY) -m benchmarks.lease third

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f tokencache_kernels/*.so $(VENV)/.installed $(VENV)/.tools

# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do everything from a bare clone: virtual environment, PyTorch, build,
# package. A second call repeats nothing. PYTHON chooses the interpreter, VENV another folder;
# with VENV=none the package is built into PYTHON's own environment, which must have all it needs:
# nothing is downloaded.

PYTHON ?= python3
VENV ?= .venv
ifeq ($(VENV),none)
BIN := $(dir $(shell command -v $(PYTHON)))
RUN := $(PYTHON)
STAMPS := build/stamps
else
BIN := $(VENV)/bin
RUN := $(BIN)/python
STAMPS := $(VENV)/stamps
endif
PIP := $(RUN) -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.py')
PYTEST_ARGS ?=
# `make gpu` leaves a copy of its results in this folder.
RESULTS ?=
# Where PyTorch comes from. Without a GPU this saves gigabytes:
#   make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=

# Compiler whose sanitizers `make sanitize` uses (GCC's: the library must be named to be preloaded).
SANITIZER_CXX ?= g++
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1

# `make train-demo` trains the bundled demo model again on the images in DATA, in MINUTES;
# `make tune-demo` goes on with it instead, U-Net and decoder at the same time.
DATA ?= data
RUNS ?= runs
DEVICE ?= cuda
MINUTES ?= 4.3

.PHONY: help demo test sanitize lint format build gpu train-demo tune-demo aims clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    synthesize a slide after a real one (two minutes, once installed)"
	@echo "make test    run the tests"
	@echo "make sanitize the operators' tests on a build that watches addresses and undefined behaviour"
	@echo "make lint    ruff, mypy and clang-format in check mode; make format repairs"
	@echo "make gpu     tests and timings on an NVIDIA GPU (ten minutes); VENV=none installs nothing"
	@echo "make train-demo DATA=IMAGES train the demo model again on a GPU, in MINUTES"
	@echo "make tune-demo DATA=IMAGES go on training the demo model on a GPU, in MINUTES"
	@echo "make aims    what was aimed at and measured, the unmet first"
	@echo "make build   compile the operators into this checkout"
	@echo "make clean   remove what was built, the environment included"

demo: $(STAMPS)/build
	$(RUN) -m ssldiff_fast demo --overwrite

test: $(STAMPS)/test
	$(RUN) -m pytest $(PYTEST_ARGS)

# The compiled operators again, with every access and conversion checked, and the tests of the
# operators on them; what needs a compiler of its own (Triton, torch.compile) is left out. Python
# itself is not instrumented, so the sanitizer comes first by LD_PRELOAD (with the C++
# library, whose exceptions it watches), and looks for no leaks.
sanitize: $(STAMPS)/test
	CXX="$(SANITIZER_CXX)" CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" SSLDIFF_CUDA=0 \
	  $(RUN) setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	asan=$$($(SANITIZER_CXX) -print-file-name=libasan.so) && \
	LD_PRELOAD="$$asan:$$($(SANITIZER_CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 SSLDIFF_LIBRARIES=$(SANITIZED)/ssldiff_fast \
	  $(RUN) -m pytest -q tests/ops --ignore tests/ops/test_triton.py -p no:cacheprovider --capture=sys \
	  -k "not compile and not opcheck and not gpu" $(PYTEST_ARGS)

gpu: $(STAMPS)/test
	$(RUN) benchmarks/gpu.py --copy "$(RESULTS)"

train-demo: $(STAMPS)/test
	$(RUN) -m ssldiff_fast train all --data "$(DATA)" -o "$(RUNS)" --device $(DEVICE) \
	  --minutes $(MINUTES) --card python/ssldiff_fast/data/he-demo/README.md

# Both runs wait for the host more than for the GPU, so they share it. Where one fails, the model is
# made of the other's part and the start's.
tune-demo: $(STAMPS)/test
	$(RUN) -m ssldiff_fast train ldm --start he-demo --recipe he-demo-ldm-more --data "$(DATA)" \
	  -o "$(RUNS)/ldm" --device $(DEVICE) --minutes $(MINUTES) & ldm=$$!; \
	$(RUN) -m ssldiff_fast train vae --start he-demo --recipe he-demo-decoder-more --data "$(DATA)" \
	  -o "$(RUNS)/decoder" --device $(DEVICE) --minutes $(MINUTES) & vae=$$!; \
	runs=; wait $$ldm && runs="--ldm $(RUNS)/ldm"; wait $$vae && runs="$$runs --vae $(RUNS)/decoder"; \
	test -n "$$runs" && $(RUN) -m ssldiff_fast train export --start he-demo $$runs \
	  -o "$(RUNS)/model" --card python/ssldiff_fast/data/he-demo/README.md
	$(RUN) -m ssldiff_fast train look --model "$(RUNS)/model" --data "$(DATA)" -o "$(RUNS)"

aims:
	@$(PYTHON) benchmarks/aims.py

build: $(STAMPS)/build

lint: $(STAMPS)/test $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build python/*.egg-info python/ssldiff_fast/*.so

ifeq ($(VENV),none)
$(STAMPS)/build: setup.py pyproject.toml $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps -e .
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/test $(STAMPS)/lint: $(STAMPS)/build
	touch $@
else
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit("ssldiff_fast needs Python 3.10 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.11 ...") if sys.version_info < (3, 10) else None'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "ssldiff_fast needs the venv module of $(PYTHON): install it (Debian or Ubuntu: apt install python3-venv) and run make again."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch first: the operators are compiled against its headers.
$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	$(PIP) install -c constraints.txt $(TORCH_ARGS) torch torchvision
	$(PIP) install -c constraints.txt setuptools wheel
	touch $@

$(STAMPS)/build: $(STAMPS)/torch setup.py pyproject.toml $(SOURCES)
	$(PIP) install -c constraints.txt --no-build-isolation -e .
	touch $@

# The package is there already: pip adds what the extra needs and builds nothing again.
$(STAMPS)/test: $(STAMPS)/build
	$(PIP) install -c constraints.txt 'ssldiff_fast[test]'
	touch $@

$(STAMPS)/lint: $(STAMPS)/venv constraints.txt
	$(PIP) install -c constraints.txt ruff mypy clang-format types-PyYAML types-tqdm
	touch $@
endif

# What the README tells people to type. Everything lives in $(VENV); nothing is installed elsewhere.
# Needed before: Python 3.11 or newer, a C++ compiler, make, git (cmake and ninja come from PyPI).

VENV    ?= .venv
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --quiet --disable-pip-version-check
NATIVE  := setup.py CMakeLists.txt $(shell find csrc -name '*.cc' -o -name '*.h' 2>/dev/null)
CXX_ALL := $(shell find csrc hybridk2 tests bench -name '*.cc' -o -name '*.h' -o -name '*.cpp' \
             -o -name '*.cu' 2>/dev/null)
HOPPER  := hybridk2/model/hopper/attention

.DEFAULT_GOAL := help
.PHONY: help demo chat serve test soak gates lint format bench bench-peers sanitize ptx clean

help:
	@echo "make demo      build, then watch the embedded model compare 9.11 with 9.9"
	@echo "make chat      build, then talk to the embedded model"
	@echo "make serve     build, then serve it over HTTP, with a chat page"
	@echo "make test      the quick suite          make soak      the long one"
	@echo "make gates     the release gates of the server: a line of figures each, 10 minutes"
	@echo "make lint      ruff, mypy, clang-format make format    rewrite what lint would refuse"
	@echo "make bench     the expert kernels against this machine's own roof"
	@echo "make bench-peers  other engines for it, each in its own environment (minutes)"
	@echo "make sanitize  the C++ side under ASan, UBSan and TSan"
	@echo "make ptx       the .cu file to the .ptx that is shipped; only after a change of it"
	@echo "make clean     remove build outputs; the virtual environment too: make clean-all"

demo: $(VENV)/.built
	@$(BIN)/hybridk2 chat --show-thinking --temperature 0 "which one is bigger, 9.11 or 9.9? think carefully." </dev/null

chat: $(VENV)/.built
	@$(BIN)/hybridk2 chat

serve: $(VENV)/.built
	@$(BIN)/hybridk2 serve

test: $(VENV)/.built $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not soak"

soak: $(VENV)/.built $(VENV)/.dev
	$(BIN)/python -m pytest -q -m soak

gates: $(VENV)/.built $(VENV)/.dev
	$(BIN)/python -m tests.gates $(GATES)

lint: $(VENV)/.built $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_ALL)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_ALL)

bench: $(VENV)/.built
	$(BIN)/python bench/experts.py

bench-peers: $(VENV)/.requirements
	PYTHON="$(BIN)/python" bench/peers/setup.sh

sanitize: $(VENV)/.requirements
	PATH="$(abspath $(BIN)):$$PATH" tests/native/run_sanitizers.sh

# Older drivers take the instructions, but not the number that this nvcc writes above them.
ptx: build/nvcc/.installed
	build/nvcc/nvidia/cu13/bin/nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=compute_90a \
	  -ptx $(HOPPER).cu -o build/attention.ptx
	{ echo "// By make ptx, from attention.cu with sha256 $$(sha256sum <$(HOPPER).cu | cut -c-64)"; \
	  sed 's/^\.version .*/.version 8.0/' build/attention.ptx; } >$(HOPPER).ptx

clean:
	rm -rf build dist *.egg-info hybridk2/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(VENV)/.built

clean-all: clean
	rm -rf $(VENV)

# Stamps: each names the last thing that was installed, and is older than what must trigger it again.

$(VENV)/.created:
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "HybridK2 needs Python 3.11 or newer; found: $$($(PYTHON) --version 2>&1 || echo none)." \
	         "Name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@command -v $(CXX) >/dev/null || \
	  { echo "HybridK2 needs a C++ compiler; '$(CXX)' is not here. Name one: make CXX=clang++"; exit 1; }
	@echo "== a virtual environment in $(VENV), of $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The build requirements are installed beside the others, and the package is built without isolation:
# a change in csrc/ then costs one incremental CMake build and no download.
REQUIREMENTS = $(BIN)/python -c 'import sys, tomllib; \
  read = tomllib.load(open("pyproject.toml", "rb")); project = read["project"]; \
  print(*{"run": read["build-system"]["requires"] + project["dependencies"], \
          "dev": project["optional-dependencies"]["dev"]}[sys.argv[1]])'

$(VENV)/.requirements: $(VENV)/.created pyproject.toml constraints.txt
	@echo "== torch and the other requirements (minutes the first time: torch is a large download)"
	@$(PIP) install -c constraints.txt $$($(REQUIREMENTS) run)
	@touch $@

$(VENV)/.built: $(VENV)/.requirements $(NATIVE)
	@echo "== the C++ extension (about a minute the first time)"
	@$(PIP) install -c constraints.txt --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.requirements
	@echo "== pytest, ruff, mypy, clang-format"
	@$(PIP) install -c constraints.txt $$($(REQUIREMENTS) dev)
	@touch $@

# For those who change a .cu: nvcc and what it needs, from PyPI, beside the environment.
build/nvcc/.installed: $(VENV)/.created
	@echo "== nvcc (a large download)"
	@$(PIP) install --no-deps --target build/nvcc $(foreach part,\
	  cuda-nvcc nvvm cuda-crt cuda-runtime cuda-cccl,'nvidia-$(part)==13.0.*')
	@touch $@

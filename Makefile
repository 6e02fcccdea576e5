# Chores of this repository. `make` alone lists them; each prints what it runs, and none does the same work twice.
#
#   PYTHON=python3.12   the interpreter that .venv is made from
#   OPS=auto            what to build of the op: auto, off, cpu, cuda
#   OFFLINE=1           no network: torch comes from PYTHON's own packages, the rest from .wheelhouse
#   TORCH_INDEX=URL     a further package index for torch, such as https://download.pytorch.org/whl/cpu
#   CONFIG= DATA= IMAGES= OUT= MODEL= FORMAT= ARGS=   for the targets that say so

PYTHON ?= python3
OPS ?= auto
MODEL ?=
CONFIG ?= fast
DATA ?=
IMAGES ?=
OUT ?=
ARGS ?=
TARGET ?= cpu
FORMAT ?= onnx
ORT_INCLUDE ?=

VENV := .venv
BIN := $(VENV)/bin
WHEELHOUSE := .wheelhouse
STAMP := $(VENV)/.stamp

PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
ifdef OFFLINE
PIP += --no-index --find-links $(WHEELHOUSE)
endif
ifdef TORCH_INDEX
PIP += --extra-index-url $(TORCH_INDEX)
endif

ORT_DEBIAN := build/onnxruntime
ORT_HEADER := $(ORT_DEBIAN)/out/usr/include/onnxruntime/onnxruntime_cxx_api.h
ORT_APT := -o Dir::State::lists=$(CURDIR)/$(ORT_DEBIAN)/lists -o Dir::Cache=$(CURDIR)/$(ORT_DEBIAN)/cache \
  -o Dir::Etc::sourcelist=$(CURDIR)/$(ORT_DEBIAN)/sources.list -o Dir::Etc::sourceparts=/dev/null \
  -o Dir::Etc::preferencesparts=/dev/null -o Dir::State::status=/dev/null -o APT::Sandbox::User=root

PACKAGING := pyproject.toml setup.py
KERNELS := setup.py $(shell find ops/csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # one pip at a time in one .venv
.PHONY: help setup ops serve train needs-data test test-all test-gpu export onnx-ops bench check typing wheel \
  wheelhouse image image-test clean

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [OPS=auto|off|cpu|cuda] [OFFLINE=1] [TORCH_INDEX=URL]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)-check $(STAMP)-ops ## everything to develop: .venv, all extras, linters, the op

ops: $(STAMP)-ops ## build the op for this machine (OPS=)

serve: $(STAMP)-serve $(STAMP)-ops ## the server on http://127.0.0.1:8000 (MODEL=, ARGS="--port 9000")
	$(BIN)/dsg serve $(if $(MODEL),--model $(MODEL)) $(ARGS)

train: needs-data $(STAMP)-train $(STAMP)-ops ## train (CONFIG=fast DATA=train.json IMAGES=folder OUT=runs/CONFIG ARGS="--set key=value")
	$(BIN)/dsg train --config $(CONFIG) $(foreach file,$(DATA),--data $(file)) \
	  $(foreach folder,$(IMAGES),--images $(folder)) --out $(or $(OUT),runs/$(notdir $(basename $(CONFIG)))) $(ARGS)

test: $(STAMP)-test $(STAMP)-ops ## the checks that need no GPU, under 12 minutes on 2 cores (ARGS="-k name")
	$(BIN)/python -m pytest $(ARGS)

test-all: $(STAMP)-all $(STAMP)-ops ## the same and the long ones, under 45 minutes
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

test-gpu: $(STAMP)-test $(STAMP)-ops ## the checks that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

export: $(STAMP)-test $(STAMP)-ops ## export a model and prove the file (MODEL=, FORMAT=onnx|torchscript|aoti OUT=runs/export ARGS=--half)
	$(BIN)/dsg export --format $(FORMAT) $(if $(MODEL),--model $(MODEL)) --out $(or $(OUT),runs/export) $(ARGS)

onnx-ops: $(STAMP)-test $(if $(ORT_INCLUDE),,$(ORT_HEADER)) ## the op's native kernels for onnxruntime (ORT_INCLUDE=folder of its headers)
	DSG_ORT_INCLUDE=$(or $(ORT_INCLUDE),$(dir $(ORT_HEADER))) DSG_BUILD_OPS=$(OPS) $(BIN)/python setup.py build_ext --inplace

bench: $(STAMP)-test $(STAMP)-ops ## measure, into bench/results (OUT=bench/results/ops.json)
	$(BIN)/dsg bench ops --out $(or $(OUT),bench/results/ops.json) $(ARGS)

check: $(STAMP)-check typing ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# mypy knows no package-dir map: this gives it the tree as it is imported.
typing:
	@mkdir -p build/typing/dsg
	@for room in ops model export service cli bench; do ln -sfn ../../../$$room build/typing/dsg/$$room; done

wheel: $(STAMP)-test ## sdist and wheel with kernels and weights, in dist/
	rm -rf build/lib* build/bdist* build/temp* dist
	$(BIN)/python -m build --no-isolation --sdist .
	DSG_BUILD_OPS=$(OPS) DSG_CUDA_ARCHS=all $(if $(ORT_INCLUDE),DSG_ORT_INCLUDE=$(ORT_INCLUDE)) $(BIN)/python -m build --no-isolation --wheel .
	@ls -l dist

wheelhouse: $(WHEELHOUSE)/.stamp ## wheels for a GPU machine without network (Python 3.12), in .wheelhouse

image: ## container image (TARGET=cpu, gpu or train)
	docker build --file docker/Dockerfile --target $(TARGET) --tag dsg:$(TARGET) .

image-test: $(STAMP)-serve ## build, run and try the cpu image without Docker; Debian, as root (OUT=bench/results/image_cpu.json)
	$(BIN)/python -m dsg.bench.image --out $(or $(OUT),bench/results/image_cpu.json) $(ARGS)

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info ops/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(STAMP)-ops

# ---- what the targets above stand on ----

needs-data:
	@$(if $(DATA),,echo "make train needs DATA=TRAIN.json (COCO format), and IMAGES=FOLDER unless it is images/ beside it" >&2; exit 2)

$(STAMP)-venv:
	@$(PYTHON) -c 'import sys; sys.exit("dsg needs Python 3.11 to 3.13, and PYTHON=$(PYTHON) is " + sys.version.split()[0] \
	  if not (3, 11) <= sys.version_info < (3, 14) else 0)'
	$(PYTHON) -m venv $(VENV)
ifdef OFFLINE
	$(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' \
	  > $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/packages_of_python.pth
endif
	@touch $@

# Each set holds the ones before it, so it marks those as done too.
$(STAMP)-serve: $(PACKAGING) | $(STAMP)-venv
	$(PIP) --editable '.[torch,serve,build]'
	@touch $@

$(STAMP)-train: $(PACKAGING) | $(STAMP)-venv
	$(PIP) --editable '.[torch,serve,build,train]'
	@touch $@ $(STAMP)-serve

$(STAMP)-test: $(PACKAGING) | $(STAMP)-venv
	$(PIP) --editable '.[test]'
	@touch $@ $(STAMP)-serve $(STAMP)-train

$(STAMP)-all: $(PACKAGING) | $(STAMP)-venv
	$(PIP) --editable '.[test-all]'
	@touch $@ $(STAMP)-serve $(STAMP)-train $(STAMP)-test

$(STAMP)-check: $(PACKAGING) | $(STAMP)-venv
	$(PIP) --editable '.[check]'
	@touch $@ $(STAMP)-serve $(STAMP)-train $(STAMP)-test

# Built against whatever torch the sets above brought.
$(STAMP)-ops: $(KERNELS) | $(STAMP)-serve
	DSG_BUILD_OPS=$(OPS) $(BIN)/python setup.py build_ext --inplace
	@touch $@

# No wheel of onnxruntime holds its headers, and Debian's package does: fetched here, and not installed.
$(ORT_HEADER):
	@mkdir -p $(ORT_DEBIAN)/lists/partial $(ORT_DEBIAN)/cache/archives/partial
	@echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main" \
	  > $(ORT_DEBIAN)/sources.list
	@{ apt-get $(ORT_APT) -qq update && cd $(ORT_DEBIAN) && apt-get $(ORT_APT) -qq download libonnxruntime-dev && \
	  dpkg-deb -x libonnxruntime-dev*.deb out; } || \
	  { echo "no headers of onnxruntime: give the folder of onnxruntime_cxx_api.h as ORT_INCLUDE=" >&2; exit 2; }

# torch and torchvision stay out: they are large, and such a machine has its own.
$(WHEELHOUSE)/.stamp: pyproject.toml .ci/wheelhouse.txt
	$(PYTHON) -m pip --disable-pip-version-check download --quiet --only-binary=:all: --no-deps --dest $(WHEELHOUSE) \
	  --python-version 3.12 --implementation cp $(foreach n,28 27 24 17 12 5,--platform manylinux_2_$(n)_x86_64) \
	  --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --requirement .ci/wheelhouse.txt
	@touch $@

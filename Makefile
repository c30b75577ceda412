# Two commands matter: `make demo` and `make test`. Both set themselves up in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed
SCENARIO ?= node-killed
PRESET ?= fast

.PHONY: demo test test-all test-strict test-fast test-pythons test-lowest test-newest lock check exhaustive bench bench-failover bench-fence bench-load bench-scale soak chaos fuzz test-versions test-vm test-sick sim sim-long clean rewrite
.DELETE_ON_ERROR:

# All that demo, tests and checks need, in the locked versions, by their hashes; then this tree itself, which needs nothing more.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else "Harmony needs Python 3.11, 3.12 or 3.13; this is %d.%d: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "this Python cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes --requirement requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)
	$(BIN)/harmonyctl demo --scenario $(SCENARIO) --preset $(PRESET)

test: $(STAMP)
	$(BIN)/python -m tests $(PYTEST_ARGS)

# All of it: each case of what `make test` samples, and 2,000 simulated hours.
test-all: $(STAMP)
	$(BIN)/python -m tests --all $(PYTEST_ARGS)

# The tests of real servers once more, one after the other and alone: each promise held to its own figure (tests/pace.py).
test-strict: $(STAMP)
	TESTS_STRICT=1 $(BIN)/python -m pytest -m real $(PYTEST_ARGS)

# Everything that needs no real server: a minute or two.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -m 'not real' $(PYTEST_ARGS)

# The same on each Python that Harmony supports and that is found here, each in an environment of its own.
PYTHONS ?= $(foreach v,11 12 13,$(firstword $(wildcard $(HOME)/.pyenv/versions/3.$(v).*/bin/python) \
	$(shell python3.$(v) -c 'import sys; print(sys.executable)' 2>/dev/null)))
FAST := -m 'not real and not computes' $(PYTEST_ARGS)
test-pythons:
	@test -n "$(strip $(PYTHONS))" || { echo "no Python 3.11, 3.12 or 3.13 found: make test-pythons PYTHONS=..." >&2; exit 1; }
	@for python in $(PYTHONS); do \
		name=$$($$python -c 'import sys; print("build/python%d.%d" % sys.version_info[:2])') && echo "$$name" && \
		$(MAKE) --no-print-directory PYTHON=$$python VENV=$$name $$name/.installed && \
		$$name/bin/python -m pytest $(FAST) || exit 1; \
	done

# The same with the lowest versions that pyproject.toml declares, and with the newest that are released (whatever it allows).
UV := build/uv/bin/uv
build/uv/.installed: Makefile
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	@touch $@

test-lowest: build/uv/.installed
	$(UV) venv --quiet --clear --python $(PYTHON) build/lowest
	$(UV) pip install --quiet --python build/lowest --resolution lowest-direct --editable '.[embedded,dev]'
	build/lowest/bin/python -m pytest $(FAST)
	build/lowest/bin/python -m pytest tests/store $(PYTEST_ARGS)  # what NATS's library does, only a server shows

test-newest: build/uv/.installed
	$(UV) venv --quiet --clear --python $(PYTHON) build/newest
	build/uv/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*(d.partition(",<")[0] for d in p["dependencies"]), sep="\n")' >build/newest/unbounded.txt
	$(UV) pip install --quiet --python build/newest --upgrade --overrides build/newest/unbounded.txt --editable '.[embedded,dev]'
	build/newest/bin/python -m pytest $(FAST)
	build/newest/bin/python -m pytest tests/store $(PYTEST_ARGS)

# requirements.lock anew, with the newest versions that pyproject.toml allows (LOCK= keeps those that it still allows).
LOCK ?= --upgrade
lock: build/uv/.installed
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra embedded --extra dev \
		--custom-compile-command 'make lock' $(LOCK) pyproject.toml --output-file requirements.lock

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The README's figures: each scenario RUNS times (about 9 minutes for 5).
RUNS ?= 5
bench: $(STAMP)
	$(BIN)/python bench/demo.py --runs $(RUNS) --preset $(PRESET)

# Harmony beside Patroni, both on the same hosts (namespaces on a switch): needs root; see docs/failover.md.
# make bench-failover PEER=patroni RUNS=1 FAILOVER='--scenario host-lost --sync off'
PEER ?= both
PATRONI ?= 4.1.5
PSYCOPG ?= 3.3.9
FAILOVER ?=
PEERS := build/bench/patroni/.installed build/bench/etcd/.installed
bench-failover: $(STAMP) $(if $(filter harmony,$(PEER)),,$(PEERS))
	$(BIN)/python -m bench.failover --peer $(PEER) --runs $(RUNS) --preset $(PRESET) $(FAILOVER)

# Of a Python that PostgreSQL's user may run.
build/bench/patroni/.installed:
	$(firstword $(wildcard /usr/bin/python3) $(PYTHON)) -m venv build/bench/patroni
	build/bench/patroni/bin/pip install --quiet --disable-pip-version-check 'patroni[etcd3,psycopg3]==$(PATRONI)' 'psycopg[binary]==$(PSYCOPG)'
	@touch $@

# Unpacked, not installed: Debian's package would start a server of its own on this machine.
build/bench/etcd/.installed:
	@mkdir -p build/bench/etcd
	@command -v etcd >/dev/null || { cd build/bench/etcd && apt-get download etcd-server && dpkg -x etcd-server_*.deb .; } || \
		{ echo "no etcd: neither on the PATH nor from apt (apt-get update; apt-get install etcd-server)" >&2; exit 1; }
	@touch $@

# Random faults from a seed at a cluster under load: needs root; see docs/chaos.md.
# make chaos SEED=7 MINUTES=30 CHAOS='--preset standard'
SEED ?=
CHAOS ?=
chaos: $(STAMP)
	$(BIN)/python -m bench.chaos $(if $(SEED),--seed $(SEED)) --minutes $(MINUTES) $(CHAOS)

# How fast writes end, for each way of stopping PostgreSQL (about 20 minutes for 5).
bench-fence: $(STAMP)
	$(BIN)/python bench/fence.py --runs $(RUNS)

# Ten minutes of a starved host: no needless fence, none late.
MINUTES ?= 10
bench-load: $(STAMP)
	$(BIN)/python bench/load.py --minutes $(MINUTES)

# An hour of a busy cluster: needless failovers, missed heartbeats, memory, cost; see docs/cost.md.
# make soak SOAK='--minutes 20 --preset standard'
SOAK ?=
soak: $(STAMP)
	$(BIN)/python -m bench.soak --preset $(PRESET) $(SOAK)

# What 1, 10, 100 and 300 clusters cost one nats-server (about 5 minutes); see docs/cost.md.
SCALE ?= --clusters 1 10 100 300
bench-scale: $(STAMP)
	$(BIN)/python -m bench.scale --preset $(PRESET) $(SCALE)

# A million frames at a real fencer.
FRAMES ?= 1000000
fuzz: $(STAMP)
	$(BIN)/python bench/fuzz.py --frames $(FRAMES)

# A real watchdog device resets a real (emulated) machine: needs apt-get and qemu-system-x86; two minutes.
test-vm: $(STAMP)
	HARMONY_VM=1 $(BIN)/python -m pytest tests/vm $(PYTEST_ARGS)

# The tests of real PostgreSQL on each version (`make test` has a few of them on 18 besides); 5 to 10 minutes a version.
VERSIONS ?= 14 15 16 17 18
REAL := tests/demo $(addprefix tests/fencer/test_,adopt.py bootstrap.py process.py rejoin.py timelines.py turned_away.py)
test-versions: $(STAMP)
	@for version in $(VERSIONS); do \
		echo "PostgreSQL $$version" && folder=$$($(BIN)/python -m tests.versions.fetch $$version) && \
		HARMONY_DEMO_POSTGRES_BIN=$$folder $(BIN)/python -m pytest $(REAL) $(PYTEST_ARGS) || exit 1; \
	done

# Whole clusters that are busy, or whose disk is full: minutes (docs/sickness.md).
test-sick: $(STAMP)
	HARMONY_SICK=1 $(BIN)/python -m pytest tests/demo/test_sickness.py $(PYTEST_ARGS)

# More of the simulation than `make test` has: make sim SEEDS=2000, or make sim HOURS=5000.
SEEDS ?= 0
HOURS ?= 5000
sim: $(STAMP)
	SEEDS=$(SEEDS) HOURS=$(HOURS) $(BIN)/python -m pytest -s tests/sim

# Larger bounds of the exhaustive check than `make test-all` has (docs/checking.md).
exhaustive: $(STAMP)
	EXHAUSTIVE=large $(BIN)/python -m pytest -s tests/exhaustive $(PYTEST_ARGS)

# 200,000 simulated hours over all cores (about 9 hours of CPU), with what was covered at the end.
LONG_HOURS ?= 200000
FIRST ?= 0
sim-long: $(STAMP)
	$(BIN)/python -m tests.sim.replay --hours $(LONG_HOURS) --first $(FIRST)

# Render the documents and scenario texts that tests hold equal to the code.
rewrite: $(STAMP)
	$(BIN)/python -m pytest -q tests/test_docs.py tests/config tests/sim/test_scenarios.py --rewrite

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# make demo   install, then the whole path on embedded servers
# make test   install, then every check and test
# make check | bench | faults | install | clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Real labelled data and a real Kafka for the tests that use them; without them those tests skip and say so.
ifneq ($(wildcard ../shared/data),)
export TOCSIN_TEST_DATA ?= $(abspath ../shared/data)
endif
ifneq ($(wildcard ../shared/kafka/libs),)
export TOCSIN_TEST_KAFKA_HOME ?= $(abspath ../shared/kafka)
endif

.PHONY: install demo test check bench faults clean

install: $(STAMP)

# torch first and pinned: left to a range, pip may take a build that is several gigabytes larger.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[local,test]'
	touch $@

demo: install
	@$(BIN)/tocsin demo

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -n 3 --dist worksteal

bench: install
	@$(BIN)/python -m tests.bench
	@$(BIN)/python -m tests.bench.pot
	@$(BIN)/python -m tests.bench.budgets
	@$(BIN)/python -m tests.bench.models

# SEED=7 KILLS=100 SERVER_FAULTS=25 LINK_FAULTS=25 make faults
faults: install
	@$(BIN)/python -m tests.faults --seed $(or $(SEED),1) --kills $(or $(KILLS),20) \
		--server-faults $(or $(SERVER_FAULTS),6) --link-faults $(or $(LINK_FAULTS),6)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

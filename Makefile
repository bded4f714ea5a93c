# make setup   create .venv from the pinned lock
# make demo    real text to a trained GPT-2 and its report, in minutes on two cores
# make test    linters and all tests of the short kind; make test-long adds those that take minutes,
#              make test-cluster runs those on a Slurm and on wires of their own (root)
SHELL := /bin/sh
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

.PHONY: help setup demo check format generate test test-long test-cluster clean lock

help:
	@sed -n 's/^# //p' Makefile

setup:
	@sh envs/setup.sh

demo: setup
	@python -m snakegpt.demo

# What a tool can decide: style, types, Snakemake's advice, and that generated files are up to date.
check: setup
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check --compact-diff Snakefile rules
	snakemake --lint
	python -m snakegpt.reference --check

format: setup
	ruff check --fix .
	ruff format .
	snakefmt Snakefile rules

# The JSON schema and the settings reference, from workflow/snakegpt/settings/.
generate: setup
	python -m snakegpt.reference

test: check
	pytest -m "not long"

test-long: check
	pytest

test-cluster: setup
	pytest -rs tests/test_network_lab.py tests/test_cluster.py

clean:
	rm -rf results logs .snakemake

# Resolve envs/requirements.in anew, in an environment of its own.
lock:
	rm -rf .venv-lock
	python3 -m venv --without-pip .venv-lock
	python3 -m pip --python .venv-lock/bin/python install --quiet -r envs/requirements.in
	(echo "# Every package of the tested environment, by \`make lock\` from envs/requirements.in."; \
	  python3 -m pip --python .venv-lock/bin/python freeze --all | sed 's/+cpu$$//') > envs/requirements.lock
	(sed '/- pip:$$/q' envs/snakegpt.yaml; sed -n 's/^[^#]/      - &/p' envs/requirements.lock) > envs/snakegpt.new
	mv envs/snakegpt.new envs/snakegpt.yaml
	rm -rf .venv-lock

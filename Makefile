# Needs git, make and Python 3.11 or newer; everything else goes into .venv and .tox here.
# ARGS goes to the command that is run:   make demo ARGS="--sparsities 0.8 0.95"
#                                         make test ARGS="-e core"
# PYTHON chooses the interpreter for a new .venv: make test PYTHON=/usr/bin/python3.12
# PARALLEL=1 has tox run two environments at a time; their output is mixed.

PYTHON ?=
ARGS ?=
PARALLEL ?=
export PYTHON

SETUP = sh scripts/setup_venv.sh
TOX = .venv/bin/python -m tox $(if $(PARALLEL),run-parallel --parallel 2 --parallel-live,run)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint docs bench clean

help:
	@echo "make demo    train sparse sub-nets on real images, then show table, report and elastic file (one to two minutes)"
	@echo "make test    lint, types, tests with every extra, tests with the core alone, docs"
	@echo "make lint    linter and formatter check"
	@echo "make docs    build the documentation into docs/_build/html and run its snippets"
	@echo "make bench   time a mask update of a ResNet-50-size network"
	@echo "make clean   remove .venv, .tox and everything built"
	@echo ""
	@echo "ARGS=\"...\" is handed on, for example: make demo ARGS=\"--help\"; make test ARGS=\"-e core\""

demo:
	@$(SETUP) demo
	@echo "[ast-plugin] Running: ast-plugin demo $(ARGS)"
	@.venv/bin/ast-plugin demo $(ARGS)

test:
	@$(SETUP) tox
	@echo "[ast-plugin] Running tox (environments: see tox.ini)"
	@$(TOX) $(ARGS)

lint:
	@$(SETUP) tox
	@$(TOX) -e lint $(ARGS)

docs:
	@$(SETUP) tox
	@$(TOX) -e docs $(ARGS)
	@echo "[ast-plugin] Open docs/_build/html/index.html"

bench:
	@$(SETUP) demo
	@.venv/bin/python benchmarks/mask_update.py $(ARGS)

clean:
	rm -rf .venv .tox build dist docs/_build htmlcov .coverage .coverage.* *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find ast_plugin integrations tests benchmarks examples scripts -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Everything runs in .venv, which the first target that needs it makes: a POSIX shell,
# make and a Python 3.12 or 3.13 are enough, and uv is used where it is on PATH.

SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO := examples/ptbxl_ecg_classification_taskaug_resnet.py

# The caller's PYTHONPATH could put another PyHealth before the installed one.
unexport PYTHONPATH PYTHONHOME
# litdata otherwise asks the package index for a newer version of itself at import.
export LITDATA_DISABLE_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint docs bench upstream-check dist venv clean outdated

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## train on a corpus written on the spot; table and pictures in output/demo
	$(PY) $(DEMO) --synthetic --mode bilevel --alignment_records 32 --output_dir output/demo

test: $(STAMP) ## run every test with its coverage, then make lint
	$(PY) -m pytest -n 2 --dist loadfile --cov --cov-report=term-missing
	@$(MAKE) --no-print-directory lint

test-fast: $(STAMP) ## run the tests that take less than a second each
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow" -q

lint: $(STAMP) ## check style and layout with ruff, types with mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(STAMP) ## build the documentation into docs/_build/html; warnings are errors
	$(PY) -m sphinx -W --keep-going docs docs/_build/html

bench: $(STAMP) ## time the steps of the training; result in benchmarks/results
	$(PY) benchmarks/speed.py

# PYHEALTH_SRC=folder is a checkout of PyHealth, UPSTREAM_TESTS= arguments of pytest.
upstream-check: $(STAMP) ## check our files inside a copy of PyHealth; PATCH=file keeps the patch
	$(PY) tools/upstream_check.py $(if $(PATCH),--patch $(PATCH))

# Without isolation: setuptools is that of .venv, and no network is needed.
dist: $(STAMP) ## build wheel and source distribution into dist/ and check them
	rm -rf build dist
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*

venv: $(STAMP) ## only make .venv (about 7 GB, minutes, once)

clean: ## remove what builds, tests and the demo wrote (.venv stays)
	rm -rf build dist ./*.egg-info .coverage .coverage.* htmlcov output/demo
	rm -rf docs/_build docs/_generated .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find pyhealth policies examples tests benchmarks docs -type d -name __pycache__ \
		-prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is the last thing an install writes. It holds the folder it was made in,
# because the editable install of a moved or copied checkout points at the old one.
ifneq ($(shell test -x $(PY) && cat $(STAMP) 2>/dev/null),$(CURDIR))
FORCE := outdated
endif

$(STAMP): setup.py pyproject.toml $(FORCE)
	@sh -c "$$SET_UP"

define SET_UP
set -eu
# Byte-code saves 12 to 17 s at each start of each worker, so it is written now even
# where the caller has turned it off.
unset PYTHONDONTWRITEBYTECODE
half_made=$(VENV)/.installing
say() { printf 'make: %s\n' "$$*"; }

if uv --version >/dev/null 2>&1; then uv=yes needs=sys; else uv= needs=ensurepip; fi

# A name on PATH proves little (a version manager's stub fails when its version is not
# selected; a system Python may lack ensurepip), so each candidate is run. It answers
# with its version and where it really lies.
find_python() {
	for python in $(PYTHON) python3.13 python3.12 python3 \
		"$${HOME:-}"/.pyenv/versions/3.13*/bin/python \
		"$${HOME:-}"/.pyenv/versions/3.12*/bin/python
	do
		found=$$("$$python" -c "import $$needs, sys
print('%d.%d' % sys.version_info[:2], sys.executable)" 2>/dev/null </dev/null) ||
			continue
		case $$found in "3.12 "* | "3.13 "*) echo "$${found#* }"; return;; esac
	done
	return 1
}

# Remove only what an earlier call of this rule made: an interrupted install, or one
# whose interpreter or checkout has gone elsewhere. An environment made by hand stays.
if [ -e $$half_made ]; then
	say "$(VENV) is half made, making it anew"
	rm -rf $(VENV)
elif [ -e $(STAMP) ]; then
	if [ -x $(PY) ] && [ "$$(cat $(STAMP))" = "$$(pwd -P)" ]; then
		mv $(STAMP) $$half_made
	else
		say "$(VENV) belongs to another folder or interpreter, making it anew"
		rm -rf $(VENV)
	fi
fi

if [ ! -x $(PY) ]; then
	if ! python=$$(find_python); then
		say "no Python 3.12 or 3.13 found. Tried python3.13, python3.12, python3 and" \
			"~/.pyenv/versions; none of them runs, reports 3.12 or 3.13 and can make a" \
			"virtual environment. Install one (with its venv module) or name one:" \
			"make $(MAKECMDGOALS) PYTHON=/path/to/python3.13" >&2
		exit 1
	fi
	say "making $(VENV) with $$python"
	mkdir -p $(VENV)
	: >$$half_made
	if [ "$$uv" ]; then
		uv venv --quiet --allow-existing --python "$$python" $(VENV)
	else
		"$$python" -m venv $(VENV)
	fi
fi

say "installing into $(VENV): about 7 GB and some minutes the first time"
rm -rf build  # a module deleted since would still go from there into a wheel
if [ "$$uv" ]; then
	uv pip install --python $(PY) --compile-bytecode -e '.[test]'
else
	$(PY) -m pip install --disable-pip-version-check -e '.[test]'
fi
pwd -P >$(STAMP)
rm -f $$half_made
$(PY) -m compileall -q pyhealth || say "a module does not compile, see above"
endef
export SET_UP

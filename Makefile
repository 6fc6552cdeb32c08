# make demo: train on real text with and without clipping, write a report page. make test: run the tests. make check: all that CI runs.
# make test-guard, and so on for each folder of tests: those alone. make slow: every cell of every matrix. make coverage: which lines the tests run.
# make mutations: plant faults that the tests must find. make docs: build the site into build/site. make wheel-test: try the wheel by itself.
# make clients: other packages, each in its own environment, with the callbacks; make clients CLIENTS="darts gluonts": these.
# make lightning-tests LIGHTNING_TESTS=…/tests: Lightning's own tests, with the callbacks in every Trainer.
# make deepspeed-tests: the tests with DeepSpeed, in an environment of their own.
# make benchmarks: repeat all timings and comparisons, about an hour.
PYTHON ?= python3
VENV := .venv-make
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOGS := logs/char_rnn
LIGHTNING ?= 2.5.0 $(shell sed -n s/^lightning==//p constraints.txt)
ALONE := .venv-wheel
LIGHTNINGS := lightning pytorch-lightning
INSTALL_ALONE = $(ALONE)/venv/bin/python -m pip --disable-pip-version-check install --quiet $$(grep ^torch== constraints.txt) \
	numpy hypothesis pytest pytest-timeout pytest-xdist
WITH_DEEPSPEED := .venv-deepspeed
CLIENTS ?=
LIGHTEST := gluonts transformers
LIGHTNING_PARTS ?= callbacks checkpointing loops tuner
QUICK := $(addprefix tests/,integration/test_clipping.py core/test_norms.py guard/test_guard.py limits/test_rules.py integration/test_resume.py $(addprefix bundles/test_,bundle.py batches.py folder.py hostile_bundles.py))

PYTEST := $(BIN)/python -m pytest --numprocesses 2

.PHONY: demo environment test slow coverage mutations check lint types examples docs dist wheel-environment wheel-test clients lightest-clients \
	lightning-tests deepspeed-tests benchmarks clean

# what is imported is compiled then: pip would compile all of twenty thousand files, most of which nobody imports
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt --editable

$(VENV)/.examples: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) ".[cli,examples]"
	touch $@

# at once: to find out what is wanted takes pip as long as to install it
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) ".[cli,examples,bench,test,docs,dev]"
	touch $(VENV)/.examples $@

# and have what the tests import compiled, which both of their workers would do
environment: $(VENV)/.installed
	$(BIN)/python -m pytest --collect-only --quiet > $(VENV)/collected || (cat $(VENV)/collected && exit 1)

demo: $(VENV)/.examples
	rm -rf $(LOGS)
	@echo "== 1/2: the same run without clipping"
	$(BIN)/python -W ignore examples/char_rnn.py fit --config configs/char_rnn.yaml --config configs/char_rnn_unclipped.yaml
	@echo "== 2/2: with GradientClipping"
	$(BIN)/python -W ignore examples/char_rnn.py fit --config configs/char_rnn.yaml
	@echo "== What happened, and which max_norm?"
	$(BIN)/clip-callbacks report $(LOGS)/csv --title "Character RNN with and without clipping" -o $(LOGS)/report.html --png $(LOGS)/png
	$(BIN)/clip-callbacks suggest $(LOGS)/csv/clipped
	@echo "Dashboard: $(BIN)/tensorboard --logdir $(LOGS)/tensorboard (tab Custom Scalars)"
	@echo "Report page, to open in a browser: $(CURDIR)/$(LOGS)/report.html"

# several processes at once: each has one thread
test test-% slow coverage mutations examples wheel-test: export OMP_NUM_THREADS := 1
# what is imported is compiled once, also where the environment says that nothing is to be kept
export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/.installed
	$(PYTEST)
	@echo "make test: all tests have passed"

test-%: $(VENV)/.installed
	$(PYTEST) tests/$*

slow: $(VENV)/.installed
	EVERY_CELL=1 $(PYTEST) -m ""

# processes that the tests start count too: each writes a file of its own
coverage: $(VENV)/.installed
	rm -f .coverage .coverage.*
	$(PYTEST) --cov --cov-report=term
	$(BIN)/python -m coverage report --fail-under=96 --format=total

mutations: $(VENV)/.installed
	$(BIN)/python -m tests.helpers.mutations

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy
	$(BIN)/mypy tests/package/typed_script.py

# every example and benchmark, as quickly as can be, two at a time; but for those whose command the tests run: norms, where_to_clip,
# accumulation and frozen (test_worked_examples.py), lightning_cli, plain_loop, gan, transformer and hydra_template (test_places.py)
examples: $(VENV)/.installed
	$(BIN)/python -m tests.helpers.run_scripts \
		"-m benchmarks --quick" \
		"-m benchmarks.norms --sets 50 --dtypes bfloat16 --budget-s 0.1" \
		"-m benchmarks.long_run --quick" \
		"-m benchmarks.trainer --networks 20 --steps 8" \
		"-m benchmarks.monitor --widths 16 --steps 8" \
		"-m benchmarks.report --steps 2000" \
		"-m benchmarks.limits --quick" \
		"-W ignore examples/distributed.py --strategy fsdp2 --devices 2 --steps 12 --poison" \
		"-W ignore examples/fabric.py --steps 60 --devices 2 --poison --folder logs/quick/fabric" \
		"-m benchmarks.importing --hosts lightning.pytorch --rounds 2" \
		"-m benchmarks.bundles --steps 64" \
		"-m benchmarks.transactions --steps 24" \
		"-m benchmarks.growth --largest 1e4 --steps 100 --budget-s 0.1" \
		"-W ignore examples/token_weighted.py --steps 4" \
		"-W ignore examples/char_rnn.py fit --config configs/char_rnn.yaml --trainer.max_steps 20 --trainer.val_check_interval 10 \
			--data.validation_batches 2 --trainer.logger.init_args.save_dir logs/quick --trainer.enable_progress_bar false" \
		"examples/global_and_local.py --quick --dropout 0.2 --l1 1e-4 --l2 1e-3 --output logs/quick_examples/regularized" \
		"examples/optimizers.py --quick --output logs/quick_examples/optimizers" \
		"examples/recurrent.py --quick --output logs/quick_examples/recurrent" \
		"examples/nan_questions.py --quick --output logs/quick_examples/nan_questions" \
		"examples/spikes.py --quick --output logs/quick_examples/spikes" \
		"-m benchmarks.ranks --sets 50 --rounds 5" \
		"-m benchmarks.after_nan" \
		"-m benchmarks.rules --set 50 --steps 200 --budget-s 0.1" \
		"-m benchmarks.step --sets 50 --budget-s 0.1" \
		"-m benchmarks.rollback --sets 50 --budget-s 0.1"
	$(BIN)/clip-callbacks report logs/quick -o logs/quick/report.html --png logs/quick/png

# python -m mkdocs: its hooks are imported from here
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# the environment of the wheel, as yet without it: with the oldest Lightning that is admitted
$(ALONE)/fresh:
	rm -rf $(ALONE) && $(PYTHON) -m venv $(ALONE)/venv
	$(INSTALL_ALONE) $(foreach package,$(LIGHTNINGS),$(package)==$(firstword $(LIGHTNING)))
	touch $@

wheel-environment: $(ALONE)/fresh

# the wheel alone in an environment that was empty, with the oldest Lightning and with the newest; the rest of the checkout is not seen
wheel-test: dist $(ALONE)/fresh
	rm $(ALONE)/fresh
	cp -r tests pyproject.toml $(ALONE)
	for lightning in $(LIGHTNING); do \
		$(INSTALL_ALONE) $(foreach package,$(LIGHTNINGS),$(package)==$$lightning) dist/*.whl && \
		(cd $(ALONE) && venv/bin/python -m pytest $(QUICK) -q -m "not slow and not ranks" --numprocesses 2) || exit 1; \
	done

clients: $(VENV)/.installed
	$(BIN)/python -m tests.clients.run $(CLIENTS)

lightest-clients: $(VENV)/.installed
	$(BIN)/python -m tests.clients.run $(LIGHTEST)

# the wheels and source distributions of Lightning have no tests: LIGHTNING_TESTS is the folder tests/ of a checkout of its repository
lightning-tests: $(VENV)/.installed
	$(BIN)/python -m tests.clients.lightning_suite "$(LIGHTNING_TESTS)" $(LIGHTNING_PARTS)

# DeepSpeed without its compiled operators: it trains on CPUs then
$(WITH_DEEPSPEED)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(WITH_DEEPSPEED)
	$(WITH_DEEPSPEED)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		setuptools wheel ninja --editable ".[cli,report]" hypothesis pytest pytest-timeout
	DS_BUILD_OPS=0 $(WITH_DEEPSPEED)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--no-build-isolation deepspeed
	touch $@

deepspeed-tests: export OMP_NUM_THREADS := 1
deepspeed-tests: $(WITH_DEEPSPEED)/.installed
	$(WITH_DEEPSPEED)/bin/python -m pytest tests/deepspeed

check: test lint types examples docs wheel-test lightest-clients

benchmarks: $(VENV)/.installed
	$(BIN)/python -m benchmarks --output budgets.md
	$(BIN)/python -m benchmarks.step --output step_cpu_float32.md
	$(BIN)/python -m benchmarks.step --dtype bfloat16 --output step_cpu_bfloat16.md
	$(BIN)/python -m benchmarks.trainer --output trainer_cpu.md
	$(BIN)/python -m benchmarks.monitor --output monitor_cpu.md
	$(BIN)/python -m benchmarks.norms --output norms_cpu.md
	$(BIN)/python -m benchmarks.long_run --output long_run_cpu.md
	$(BIN)/python -m benchmarks.importing --output importing_cpu.md
	$(BIN)/python -m benchmarks.growth --output growth_cpu.md
	$(BIN)/python -m benchmarks.ranks --output ranks_cpu.md
	$(BIN)/python -m benchmarks.rules --output rules_cpu.md
	$(BIN)/python -m benchmarks.after_nan --output after_nan.md
	$(BIN)/python -m benchmarks.limits --output limits.md
	$(BIN)/python -m benchmarks.report --output report_cpu.md
	$(BIN)/python -m benchmarks.bundles --output bundles_cpu.md
	$(BIN)/python -m benchmarks.transactions --output transactions_cpu.md
	$(BIN)/python -m benchmarks.rollback --output rollback_cpu.md

clean:
	rm -rf $(VENV) $(ALONE) $(WITH_DEEPSPEED) .venv-clients build dist logs .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis

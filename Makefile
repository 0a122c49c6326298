# Set-up comes before every target and costs nothing once it is done.
PYTHON ?= python3
PY     := .venv/bin/python
PORT   ?= 8188
# Kept, whatever this machine is used to: without their bytecode, torch and ComfyUI take seconds of every process.
export PYTHONDONTWRITEBYTECODE =
# Only tests and screenshots open ComfyUI's page, so only they need a browser.
BROWSER := $(if $(filter test test-all test-versions pictures,$(MAKECMDGOALS)),--browser)

# $(call timed,what,command): say what runs, run it, say how long it took. The first failure ends it.
timed = @printf '%s\n' '$(1)'; start=$$(date +%s); { $(2); } && printf '%s: %d s in all\n' '$(1)' $$(( $$(date +%s) - start ))

help:
	@echo 'make demo        pictures on this computer, in a few minutes, into output/'
	@echo 'make test        papers, nodes, the real server, the real page; of long sweeps a part'
	@echo 'make test-all    every combination, and the long tests too'
	@echo 'make test-gpu    the tests that need an accelerator, by themselves'
	@echo 'make test-versions  the pictures of the CPU demos on an older ComfyUI, against this one'
	@echo 'make check       the seconds before a commit: lint, and the tests of models/'
	@echo 'make lint        ruff and pyright'
	@echo 'make serve       ComfyUI with this pack, on port $(PORT) (PORT=... for another)'
	@echo 'make bench       the race of the accelerators; the cost of attention, of EasyControl, of DiT4SR, of DynamiCtrl, of loading the pack; tables of jobs'
	@echo 'make figures     the figures of README, docs and model card, from the results files'
	@echo 'make pictures    the pictures of README, help pages and workflows (PICTURES=... for some of them)'
	@echo 'make train-tiny  train the embedded models again'
	@echo 'make clean       remove what make built, downloads excepted (make distclean removes those too)'

setup:
	@$(PYTHON) -m scripts.setup $(BROWSER)

demo: setup
	@$(PY) -m scripts.demo

# Three processes with a thread each: those of the page wait most of the time. Tiny models gain nothing from a second
# thread, and lose much where they share it. pytest's closing lines stay the last ones: they carry counts and times.
# Split by measured time; what needs the server stays together. tests/selection.py says what test-all adds.
ALL      = $(if $(filter test-all,$@),--all)
FEATURES = $(addprefix tests/host/,accelerate control animate restore) \
	$(addprefix tests/host/test_,embedded.py embedded_cogvideox.py blocks.py foreign.py)
PAGE     = tests/browser tests/workflows tests/nodes/test_in_context_lora.py
test test-all: setup web-test
	@echo 'Tests of features, of the page, and all others, side by side'
	@export OMP_NUM_THREADS=1; mkdir -p .cache; \
	$(PY) -m pytest $(ALL) --durations=15 $(FEATURES) >.cache/test-features.txt 2>&1 & features=$$!; \
	$(PY) -m pytest $(ALL) --durations=15 $(PAGE) >.cache/test-page.txt 2>&1 & page=$$!; \
	$(PY) -m pytest $(ALL) --durations=15 $(addprefix --ignore=,$(FEATURES) $(PAGE)); others=$$?; \
	wait $$page; page=$$?; cat .cache/test-page.txt; \
	wait $$features; features=$$?; cat .cache/test-features.txt; \
	exit $$((others + page + features))

test-gpu: setup
	@echo 'Tests on the accelerator'
	@$(PY) -m pytest -m gpu --all

test-versions: setup
	$(call timed,Pictures on two versions of ComfyUI,$(PY) -m scripts.versions)

web-test: setup
	@if ls tests/web/*.js tests/web/*.mjs >/dev/null 2>&1; then echo 'Tests of the page scripts'; $(PY) -m scripts.node --test tests/web/*.mjs; fi

lint: setup
	$(call timed,Lint,$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m pyright)

check: setup web-test
	$(call timed,Check,$(PY) -m ruff check . && $(PY) -m pyright && $(PY) -m pytest tests/models)

serve: setup
	@echo 'ComfyUI with this pack'
	@$(PY) -m scripts.server '$(PORT)'

bench: setup
	$(call timed,Benchmarks,$(PY) -m benchmarks.load && $(PY) -m benchmarks.easycontrol && $(PY) -m benchmarks.dit4sr && $(PY) -m benchmarks.dynamictrl && $(PY) -m benchmarks.attention && $(PY) -m benchmarks.accelerators && $(PY) -m benchmarks.autotune && $(PY) -m benchmarks.headless)

figures: setup
	@$(PY) -m scripts.figures

# PICTURES=... makes those whose path has these words in it
pictures: setup
	$(call timed,Pictures,$(PY) -m scripts.pictures $(PICTURES))

train-tiny: setup
	$(call timed,Training of the embedded models,$(PY) -m training all)

# The hashed requirements, from the short lists beside them. Needed only to move to newer versions.
PINS = --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --upgrade --quiet
# What comfy-cli brings for its other commands, and its converter never imports: 180 MB, and two that report usage.
LEFT_OUT = $(addprefix --no-emit-package ,imageio-ffmpeg mixpanel posthog)
pins:
	cd scripts/requirements && uv pip compile host.in ../../.comfyui/ComfyUI/requirements.txt $(PINS) -o host.txt
	cd scripts/requirements && uv pip compile dev.in -c host.txt $(PINS) -o dev.txt
	cd scripts/requirements && uv pip compile headless.in -c host.txt -c dev.txt $(PINS) $(LEFT_OUT) -o headless.txt
	cd scripts/requirements && uv pip compile uv.in $(PINS) -o uv.txt

clean:
	@echo 'Removing results and caches'
	@rm -rf output .cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv/*' -not -path './.comfyui/*' -prune -exec rm -rf {} +

distclean: clean
	@echo 'Removing .venv and .comfyui, models that you put there included'
	@rm -rf .venv .comfyui

.PHONY: help setup demo test test-all test-gpu test-versions web-test lint check serve bench figures pictures train-tiny pins clean distclean

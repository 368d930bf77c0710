PYTHON ?= python3
ENV := .venv
PY := $(ENV)/bin/python

.PHONY: run test check bench docs kernels sanitize size clean

run: $(ENV)/ready
	$(PY) -m kloss.run $(ARGS)

# A process per core, each with one thread: two threads that wait for a busy core are slower than one.
test: $(ENV)/ready-to-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal $(ARGS)

check: $(ENV)/ready-to-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(ENV)/ready-to-test
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_benchmarks.py --benchmark-only --benchmark-columns=median,iqr,rounds
	OMP_NUM_THREADS=1 $(PY) -m bench.crossover $(ARGS)

# The pages of docs/ and the functions' docstrings, into site/.
docs: $(ENV)/ready
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[docs]'
	$(PY) -m mkdocs build --strict

kernels: $(ENV)/ready-to-test
	$(PY) -m bench.compiled $(ARGS)

# The C++ under AddressSanitizer and UBSan, built beside the installed one; -P keeps Python from importing that.
SANITIZERS := -fsanitize=address,undefined
sanitize: $(ENV)/ready-to-test
	CXXFLAGS="$(SANITIZERS) -fno-sanitize-recover=undefined -g" LDFLAGS="$(SANITIZERS)" \
	  $(PY) setup.py -q build --build-lib build/sanitized --build-temp build/sanitized-objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=build/sanitized $(PY) -P -m pytest -q -o pythonpath=tests -o addopts= tests/test_multi_lora_cpu.py \
	  tests/test_attention_cpu.py tests/test_multi_lora_faults.py tests/test_op_faults.py tests/test_rows_cpu.py \
	  tests/test_shared_bodies.py tests/test_spans_cpu.py

size:
	@git ls-files 'kloss/*.py' 'kloss/*.j2' 'kloss/*.css' 'bench/*.py' 'csrc/*' setup.py | xargs wc -l | sort -n

clean:
	rm -rf $(ENV) build *.egg-info .pytest_cache .ruff_cache

# torch goes in first and by its exact version: a CPU wheel at hand is then taken, and nothing after it pulls another one.
# csrc/ is built against that torch, so nothing is built apart from it; without a C++ compiler plain torch serves the CPU.
$(ENV)/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
	test -x $(PY) || $(PYTHON) -m venv $(ENV)
	$(PY) -m pip install -q $$(grep '^torch==' constraints.txt)
	$(PY) -m pip install -q -c constraints.txt setuptools
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e .
	touch $@

# seqeval comes as source only and builds with tools of its own, so it is built by itself.
$(ENV)/ready-to-test: $(ENV)/ready
	$(PY) -m pip install -q -c constraints.txt seqeval
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

# make serve     environment, install, demo server
# make bench     the engine beside transformers' generate and PEFT's mixed batch; reports in build/
# make bench-peers   the server beside the servers people use today; environments and reports in build/peers/
# make bench-calibration   what a calibration costs, alone and beside requests; reports in build/
# make bench-scaling       how the engine scales, a curve a quantity; reports and drawings in build/
# make soak      trust in full, some fifty minutes: the three that follow; reports in build/
# make soak-load   ten minutes of 200 clients of all manners on one server
# make soak-tests  the slow tests of keys, containment, connections and faults
# make kill        a server killed at twenty moments with either database
# make test-ray  the Ray Serve application on a cluster of two nodes on this machine
# make test-vllm  the plugin for vLLM in a real one; its environment is that of bench-peers, in build/peers
# make test-clients   lm-evaluation-harness, LangChain and LiteLLM against a server
# make test-console   the console in a real Chromium, which is Debian's package or named by CHROMIUM
# make test-docker    the CPU image built and run, then compose.yaml, with podman and as root; sizes are printed
# make test-docker-cuda   the CUDA image built and run on a CPU, likewise; it downloads 2.8 GB
# make test-helm      the Helm chart's container in that image, after it; as root
# make test      format, lint, types and tests, on the built wheel
# make test-all  that, its slow tests and every test- above: for root, with podman, Chromium and tcmalloc
# make release   what a release is made of, built and proved; in build/release
#
# .venv runs the checkout. .venv-test is for tests: made from nothing, it holds the built wheel, so
# that what is tested is what users install. Stamp files keep a second run fast.

PYTHON ?= python3
TORCH_TESTED := 2.13.0
SOURCES := $(shell find server boundary -type f -not -path '*/.*' -not -name '*.pyc') LICENSE README.md
TEST_PYTHON := .venv-test/bin/python
# The checkout must not be importable; and one thread, because on models this small a second one
# only waits, by spinning, which on a busy machine costs several times the work itself.
TEST_ENV := PYTHONSAFEPATH=1 EXPECT_WHEEL=1 OMP_NUM_THREADS=1
# A worker a core; tests of one file share its servers, so they stay together.
PYTEST := $(TEST_PYTHON) -m pytest -n logical --maxprocesses 8 --dist loadfile

# Nothing may wait for an answer, and `import server` must never find the checkout by accident.
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef CI
export PIP_PROGRESS_BAR := off
endif

.PHONY: serve bench bench-peers bench-calibration bench-scaling soak soak-load soak-tests \
	kill test test-all test-console test-docker test-docker-cuda test-ray test-vllm check format clean release test-helm test-clients
.DELETE_ON_ERROR:

SITE := import sysconfig; print(sysconfig.get_path("purelib"))

serve: .venv/installed
	.venv/bin/fathom serve

BENCH := .venv/bin/fathom bench --random-model 12x768:intermediate=2048:heads=12:vocab=8000 \
	--dtype float32 --device cpu --concurrency 16 --num-requests 32 --prompt-len 64 --output-len 64

bench: .venv/installed
	mkdir -p build
	$(BENCH) --num-adapters 4 --rank 16 --baselines generate,peft --check --json build/bench-adapters.json
	$(BENCH) --baselines generate --check --json build/bench-base.json

# Debian's tcmalloc is preloaded into vLLM, which is not measured without it; PEERS adds options.
bench-peers: .venv/peers
	.venv/bin/python -m tests.bench.peers $(PEERS)

CALIBRATION := .venv/bin/python -m server.bench.calibration

bench-calibration: .venv/installed
	mkdir -p build
	$(CALIBRATION) cost --json build/calibration-cost.json
	$(CALIBRATION) memory --json build/calibration-memory.json
	$(CALIBRATION) latency --json build/calibration-latency-demo.json
	$(CALIBRATION) latency --random-model 12x768:intermediate=2048:heads=12:vocab=8000 \
		--num-samples 16 --repeat 1 --json build/calibration-latency-12x768.json

SCALING := .venv/bin/python -m server.bench.scaling
CURVES := concurrency adapters depth rank context

bench-scaling: .venv/installed
	mkdir -p build
	for curve in $(CURVES); do \
		$(SCALING) $$curve --json build/scaling-$$curve.json --svg build/scaling-$$curve.svg || exit 1; \
	done
	$(SCALING) picture $(CURVES:%=build/scaling-%.json) --svg build/scaling.svg
	$(SCALING) step --json build/scaling-step.json
	$(SCALING) prefix --output-len 8 --json build/scaling-prefix.json
	$(SCALING) preemption --rounds 4 --json build/scaling-preemption.json
	$(SCALING) long-context --json build/scaling-long-context.json
	$(SCALING) resident --json build/scaling-resident.json
	$(SCALING) registered --json build/scaling-registered.json

# One after the other, whatever -j says: each would slow the others down.
soak:
	$(MAKE) soak-load
	$(MAKE) soak-tests
	$(MAKE) kill

# SOAK adds options. The clients are the checkout's, the server is the wheel.
soak-load: .venv-test/wheel
	mkdir -p build
	OMP_NUM_THREADS=1 $(TEST_PYTHON) -m tests.soak --json build/soak.json $(SOAK)

# One process: thousands of connections and slow readers each want the machine to themselves.
soak-tests: .venv-test/wheel
	$(TEST_ENV) $(TEST_PYTHON) -m pytest -m slow \
		tests/live tests/containment tests/connections tests/faults

# KILL adds options, as SOAK does.
kill: .venv-test/wheel
	mkdir -p build
	for database in sqlite postgresql; do \
		OMP_NUM_THREADS=1 $(TEST_PYTHON) -m tests.faults.kill --database $$database \
			--json build/kill-$$database.json $(KILL) || exit 1; \
	done

test: check .venv-test/wheel
	$(TEST_ENV) $(PYTEST) -m "not slow"

test-all: check .venv-test/wheel
	$(TEST_ENV) $(PYTEST)
	$(MAKE) test-console
	$(MAKE) test-clients
	$(MAKE) test-ray
	$(MAKE) test-vllm
	$(MAKE) test-docker
	$(MAKE) test-helm
	$(MAKE) test-docker-cuda

# One process: what these tests wait for is often the processor.
test-console: .venv-test/browser
	$(TEST_ENV) $(TEST_PYTHON) -m pytest tests/browser

# Some of their modules warn when they are imported.
test-clients: .venv-clients/installed
	$(TEST_ENV) .venv-clients/bin/python -m pytest -W default tests/clients

test-docker:
	docker/test.sh
	docker/test-compose.sh

test-docker-cuda:
	docker/test-cuda.sh

test-helm: .venv-test/wheel
	$(TEST_PYTHON) -m tests.deploy.chart.in_image

# Ray's own modules warn when they are imported.
test-ray: .venv-test/ray
	$(TEST_ENV) $(TEST_PYTHON) -m pytest -W default -s tests/ray

release:
	.ci/build-release build/release

# PEERS names another place of the environments. Debian's tcmalloc is preloaded, as for bench-peers.
test-vllm: .venv-test/wheel
	$(TEST_ENV) $(TEST_PYTHON) -m pytest -s tests/vllm

check: .venv-test/wheel
	.venv-test/bin/ruff format --check .
	.venv-test/bin/ruff check .
	.venv-test/bin/mypy

format: .venv-test/wheel
	.venv-test/bin/ruff format .
	.venv-test/bin/ruff check --fix .

clean:
	rm -rf .venv .venv-test .venv-clients build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

KERNELS := .ci/compile_kernels.py $(wildcard server/model/native/*.[ch])

.venv/installed: pyproject.toml .ci/install-torch $(KERNELS)
	$(call make_venv,.venv)
	.ci/install-torch .venv/bin/python
	.venv/bin/python -m pip install --editable .
	touch $@

.venv/peers: .venv/installed
	.venv/bin/python -m pip install --editable '.[peers]'
	touch $@

.venv-test/installed: pyproject.toml .ci/install-torch
	$(call make_venv,.venv-test)
	.ci/install-torch $(TEST_PYTHON) $(TORCH_TESTED)
	$(call build_wheel)
	$(TEST_PYTHON) -m pip install "$$(echo dist/*.whl)[dev]"
	touch $@

.venv-test/wheel: .venv-test/installed $(SOURCES) $(KERNELS)
	$(call build_wheel)
	$(TEST_PYTHON) -m pip install --force-reinstall --no-deps dist/*.whl
	touch $@

# Of Playwright the client alone: it would download a browser of its own if it were asked to.
.venv-test/browser: .venv-test/wheel
	@[ -n "$$CHROMIUM" ] || which chromium || which chromium-browser || which google-chrome \
		|| { echo 'No Chromium: on Debian, apt install chromium; or name one with CHROMIUM=' >&2; exit 1; }
	$(TEST_PYTHON) -m pip install "$$(echo dist/*.whl)[browser]"
	touch $@

.venv-test/ray: .venv-test/wheel
	$(TEST_PYTHON) -m pip install "$$(echo dist/*.whl)[ray]"
	touch $@

# A place of their own over the tests': they bring much, and transformers imports what it finds.
.venv-clients/installed: .venv-test/wheel
	rm -rf .venv-clients
	$(TEST_PYTHON) -m venv .venv-clients
	$(TEST_PYTHON) -c '$(SITE)' > "$$(.venv-clients/bin/python -c '$(SITE)')/tests.pth"
	.venv-clients/bin/python -m pip install "$$(echo dist/*.whl)[clients]"
	touch $@

define make_venv
rm -rf $(1)
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo 'Fathom needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
$(PYTHON) -m venv $(1) \
	|| { rm -rf $(1); echo 'No venv module: on Debian, apt install python3-venv' >&2; exit 1; }
endef

define build_wheel
rm -rf dist
$(TEST_PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
endef

# Tokenwire. `make help` lists the targets; every one installs what it needs first.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
CONTRACT := build/contract
CBIN := $(CONTRACT)/venv/bin
INCLUDE := $(CONTRACT)/include
STUBS := clients/python/src
PIP_INSTALL := pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r
PROTOS = $(sort $(wildcard protos/tokenwire/v1/*.proto protos/tokenwire/admin/v1/*.proto))
ARGS ?=

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# --- environments -------------------------------------------------------------------

.PHONY: setup
setup: $(BIN)/.complete ## Install everything into .venv; leaves .venv/bin/tokenwire

$(BIN)/.complete: tests/requirements.txt service/pyproject.toml clients/python/pyproject.toml
	@echo "Installing Python packages into .venv (once; a minute or so)..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/$(PIP_INSTALL) tests/requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e clients/python -e service
	@touch $@

# The contract's tools live apart: see protos/requirements.in.
$(CONTRACT)/.complete: protos/requirements.txt
	@echo "Installing the contract's tools into $(CONTRACT)..."
	@test -x $(CBIN)/python || $(PYTHON) -m venv $(CONTRACT)/venv
	@$(CBIN)/$(PIP_INSTALL) protos/requirements.txt
	@mkdir -p $(INCLUDE)/google/api $(INCLUDE)/google/rpc
	@site=$$($(CBIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	cp "$$site"/google/api/field_behavior.proto $(INCLUDE)/google/api/; \
	cp "$$site"/google/rpc/{status,error_details}.proto $(INCLUDE)/google/rpc/
	@touch $@

.PHONY: setup-contract
setup-contract: $(CONTRACT)/.complete ## Install the contract's tools (buf, protoc) into build/contract

.PHONY: lock
lock: $(BIN)/.complete ## Resolve the newest versions into the hash-pinned requirements.txt files
	@export UV_CUSTOM_COMPILE_COMMAND="make lock"; \
	compile="$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header"; \
	$$compile protos/requirements.in -o protos/requirements.txt; \
	$$compile service/requirements.in -o service/requirements.txt; \
	$$compile tests/requirements.in -c service/requirements.txt -o tests/requirements.txt; \
	$$compile tests/wire/requirements.in -o tests/wire/requirements.txt; \
	$$compile deploy/requirements.in -o deploy/requirements.txt; \
	for server in $(SERVERS); do $$compile tests/servers/$$server.in -o tests/servers/$$server.txt; done

# An upstream written by others: see tests/aimock. CI must test against it; a developer's
# machine without Node, or offline, skips those tests.
build/npm/.complete: tests/aimock/package.json tests/aimock/package-lock.json tests/aimock/.npmrc
	@mkdir -p $(@D)
	@cp $^ $(@D)
	@if npm ci --prefix $(@D) --prefer-offline --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null; \
	then touch $@; else echo "npm cannot install aimock: its tests fail in CI and are skipped elsewhere"; test -z "$${CI:-}"; fi

# Clients written by others: see tests/wire. As above, what cannot be installed fails in CI.
WIRE := build/wire
RUBY := docs/clients/ruby
missing = || { echo "$(1): its tests fail in CI and are skipped elsewhere"; test -z "$${CI:-}"; }

.PHONY: setup-wire
setup-wire: $(WIRE)/bin/.complete $(WIRE)/venv/.complete setup-ruby setup-load ## Install the clients by others that tests/wire calls the gateway with

# The Go client as tests/rolling runs it.
.PHONY: setup-load
setup-load:
	@$(MAKE) --silent -C clients/go load $(call missing,go cannot build the load of tests/rolling)

# Versions and hashes are those of go.mod and go.sum. -p 2: the memory of others counts, too.
$(WIRE)/bin/.complete: tests/wire/tools/go.mod tests/wire/tools/go.sum
	@echo "Building grpcurl, ghz and grpc-health-probe into $(@D) (once; some minutes)..."
	@(cd tests/wire/tools && GOBIN="$(CURDIR)/$(@D)" GOFLAGS="-mod=readonly -buildvcs=false" nice go install -p 2 -ldflags="-s -w" tool && touch "$(CURDIR)/$@") \
		$(call missing,go cannot build the programs of tests/wire/tools)

$(WIRE)/venv/.complete: tests/wire/requirements.txt
	@echo "Installing grpclib into $(@D)..."
	@(test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)) && $(@D)/bin/$(PIP_INSTALL) tests/wire/requirements.txt && touch $@ \
		$(call missing,grpclib cannot be installed)

# Debian's packages, which only root installs.
.PHONY: setup-ruby
setup-ruby:
	@$(MAKE) --silent -C $(RUBY) available || $(MAKE) --silent -C $(RUBY) setup $(call missing,Ruby's gRPC cannot be installed)

# A browser for tests/page. Debian's package, which only root installs.
.PHONY: setup-page
setup-page: ## Install Chromium, which the tests of the status page look through
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
		$(call missing,Chromium cannot be installed)

# For tests/monitoring: Prometheus and its promtool, Debian's package, which only root installs; the
# OpenTelemetry Collector with the two parts that are needed. go sees itself what has changed.
.PHONY: setup-monitoring
setup-monitoring: ## Install Prometheus and build the OpenTelemetry Collector, to which tests report
	@(cd tests/monitoring/collector && GOFLAGS="-mod=readonly -buildvcs=false" nice go build -p 2 -ldflags="-s -w" -o "$(CURDIR)/build/monitoring/otelcol" .) \
		$(call missing,go cannot build the collector of tests/monitoring/collector)
	@command -v promtool >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends prometheus >/dev/null; } \
		$(call missing,Prometheus cannot be installed)

# A Redis for tests/shared. Debian's package, which only root installs.
.PHONY: setup-redis
setup-redis: ## Install redis-server, which the tests of shared state run
	@command -v redis-server valkey-server >/dev/null || { apt-get update -qq && apt-get install -qq --yes --no-install-recommends redis-server >/dev/null; } \
		$(call missing,redis-server cannot be installed)

.PHONY: screenshots
screenshots: $(BIN)/.complete ## Draw the pictures of the status page in docs/images anew
	@TOKENWIRE_SCREENSHOTS=$(CURDIR)/docs/images CI=1 $(BIN)/pytest tests/page -k picture

# What renders, validates and lints the things below deploy/, and counts what is in the image: see
# deploy/requirements.in.
DEPLOY := build/deploy
DBIN := $(DEPLOY)/venv/bin

.PHONY: setup-deploy
setup-deploy: $(DEPLOY)/.complete $(DEPLOY)/bin/.complete ## Install Helm, the linters and validators of deploy/ into build/deploy

$(DEPLOY)/.complete: deploy/requirements.txt
	@echo "Installing what checks deploy/ into $(DEPLOY)..."
	@(test -x $(DBIN)/python || $(PYTHON) -m venv $(DEPLOY)/venv) && $(DBIN)/$(PIP_INSTALL) deploy/requirements.txt && touch $@ \
		$(call missing,what checks deploy/ cannot be installed)

# Not optimised, which takes a third of the compiler's time away.
$(DEPLOY)/bin/.complete: deploy/tools/go.mod deploy/tools/go.sum
	@echo "Building kube-score and kustomize into $(@D) (once; a minute or two)..."
	@(cd deploy/tools && GOBIN="$(CURDIR)/$(@D)" GOFLAGS="-mod=readonly -buildvcs=false" nice go install -p 2 -gcflags=all="-N -l" -ldflags="-s -w" tool && touch "$(CURDIR)/$@") \
		$(call missing,go cannot build the programs of deploy/tools)

.PHONY: manifests
manifests: $(DEPLOY)/.complete ## Write the base and components of deploy/kustomize from the chart
	@$(DBIN)/python deploy/manifests.py deploy/kustomize

SBOM := build/sbom.cdx.json

.PHONY: sbom
sbom: $(DEPLOY)/.complete ## List what the gateway is made of, as CycloneDX, into build/sbom.cdx.json
	@$(DBIN)/cyclonedx-py requirements --output-reproducible --output-file $(SBOM) service/requirements.txt

# Builds and runs the image without a Docker engine, as root. Its base is this machine's Python, for no
# registry of images need be there; a developer with Docker just runs `docker build`.
.PHONY: setup-image
setup-image: build/image/.complete ## Install buildah and podman (Debian, root), and a base image for tests/deploy

ENGINE_PACKAGES := buildah podman runc catatonit netavark uidmap
IMAGE_STORE := --root $(CURDIR)/build/image/store --runroot $(CURDIR)/build/image/run

build/image/.complete: service/requirements.txt tests/deploy/base_image.py deploy/image/assemble.py $(BIN)/.complete
	@echo "Making a base image in $(@D)..."
	@mkdir -p $(@D)
	@($(MAKE) --silent install-engine && \
		$(BIN)/pip download --quiet --disable-pip-version-check --require-hashes --no-deps -r $< -d $(@D)/wheels && \
		$(BIN)/python tests/deploy/base_image.py $(@D)/wheels $(@D)/base.tar && \
		podman $(IMAGE_STORE) import --quiet $(@D)/base.tar localhost/tokenwire-base >/dev/null 2>&1 && \
		podman $(IMAGE_STORE) image prune --force >/dev/null 2>&1 && rm $(@D)/base.tar && touch $@) $(call missing,images cannot be built here)

.PHONY: install-engine
install-engine:
	@for package in $(ENGINE_PACKAGES); do dpkg --status $$package >/dev/null 2>&1 || missing=yes; done; \
	if [ -n "$${missing:-}" ]; then apt-get update -qq -o DPkg::Lock::Timeout=300; \
	apt-get install -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 $(ENGINE_PACKAGES) >/dev/null; fi

# Upstreams written by others, each apart: see tests/servers. CI tests against LiteLLM; the other two
# are too heavy for it: gigabytes of torch, a quarter of an hour of C++.
SERVERS := litellm transformers llama_cpp

build/servers/%/.complete: tests/servers/%.txt $(BIN)/.complete
	@echo "Installing $* into $(@D)..."
	@test -x $(@D)/venv/bin/python || $(PYTHON) -m venv $(@D)/venv
	@nice $(BIN)/uv pip install --quiet --compile-bytecode --python $(@D)/venv/bin/python --require-hashes --no-deps -r $<
	@touch $@

.PHONY: setup-servers
setup-servers: $(SERVERS:%=build/servers/%/.complete) ## Install the servers by others that test-servers tests against

.PHONY: test-servers
test-servers: setup-servers ## Test against LiteLLM, transformers and llama.cpp (the last two are heavy: not in CI)
	$(BIN)/pytest tests/servers $(ARGS)

# --- clients ------------------------------------------------------------------------
# Each client but Python's has a Makefile of its own with the targets: available (fails without
# its toolchain), setup, generate, check, test, package, conformance, conformance-command.

CLIENTS := $(patsubst clients/%/Makefile,%,$(wildcard clients/*/Makefile))
in-clients = for client in $(CLIENTS); do \
	if $(MAKE) --silent -C clients/$$client available; then $(MAKE) --silent -C clients/$$client $(1) || exit 1; \
	else echo "SKIPPED clients/$$client: its toolchain is not installed"; test -z "$${CI:-}" || exit 1; fi; done

.PHONY: conformance
conformance: $(BIN)/.complete $(CONTRACT)/.complete ## Run every client against one gateway; writes docs/conformance.md
	@GRPC_VERBOSITY=NONE PYTHONPATH=tests $(BIN)/python -m conformance.driver $(if $(ARGS),$(ARGS),--write docs/conformance.md)

# Each waits in a process of its own: two minutes for all of them.
.PHONY: test-idle
test-idle: ## Test that a silent stream lives for 120 s with the default options of each client
	@mkdir -p build; waiting=; for client in $(CLIENTS); do \
		if $(MAKE) --silent -C clients/$$client available; then \
			$(MAKE) --silent -C clients/$$client test-idle >build/idle-$$client.log 2>&1 & waiting="$$waiting $$client:$$!"; \
		else echo "SKIPPED clients/$$client: its toolchain is not installed"; test -z "$${CI:-}" || exit 1; fi; done; \
	for each in $$waiting; do wait $${each#*:} || { cat build/idle-$${each%:*}.log; exit 1; }; done

.PHONY: package
package: $(BIN)/.complete $(CONTRACT)/.complete ## Build what is published: wheels, Go module, jars, crate, npm tarball, into build/
	@rm -rf build/wheels
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation ./clients/python ./service -w build/wheels
	@$(BIN)/python clients/python/outside/check.py build/wheels build/outside-python
	@$(call in-clients,package)

# --- contract -----------------------------------------------------------------------

.PHONY: generate
generate: $(CONTRACT)/.complete ## Generate every client's stubs from protos/
	@rm -f $(STUBS)/tokenwire/{v1,admin/v1}/*_pb2*
	@PATH="$(CURDIR)/$(CBIN):$$PATH" $(CBIN)/python -m grpc_tools.protoc -Iprotos -I$(INCLUDE) \
		--python_out=$(STUBS) --grpc_python_out=$(STUBS) \
		--mypy_out=$(STUBS) --mypy_grpc_out=$(STUBS) $(PROTOS)
	@for proto in $(PROTOS); do stub=$${proto#protos/}; stub=$(STUBS)/$${stub%.proto}_pb2_grpc; \
		grep -q '^service ' $$proto || rm -f $$stub.py $$stub.pyi; done
	@$(call in-clients,generate)

.PHONY: check-contract
check-contract: $(CONTRACT)/.complete
	$(CBIN)/buf lint protos
	$(CBIN)/buf format --diff --exit-code protos
	@tag=$$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null || true); \
	if [ -z "$$tag" ]; then echo "buf breaking: no v* tag yet, nothing to compare with"; else \
	rm -rf build/released; mkdir -p build/released; \
	git archive "$$tag" protos buf.yaml | tar -x -C build/released; \
	mkdir -p build/released/$(CONTRACT); cp -r $(INCLUDE) build/released/$(INCLUDE); \
	echo "buf breaking --against $$tag"; $(CBIN)/buf breaking protos --against build/released/protos; fi

# Who changes a .proto cannot forget a client: tests/wire/test_generated.py.
.PHONY: check-generated
check-generated: generate
	@dirty=$$(git status --porcelain -- clients); if [ -n "$$dirty" ]; then \
		echo "clients/ differs from what is committed: commit your changes there, and what 'make generate' wrote."; echo "$$dirty"; exit 1; fi

# --- quality ------------------------------------------------------------------------

.PHONY: format
format: $(BIN)/.complete $(CONTRACT)/.complete ## Format code and contract
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .
	@$(CBIN)/buf format --write protos

.PHONY: check
check: $(BIN)/.complete $(CONTRACT)/.complete check-contract ## Everything CI checks besides the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@$(call in-clients,check)
	@$(MAKE) check-generated
	@if [ -n "$${CI:-}" ] && [ -n "$$(git status --porcelain)" ]; then \
		echo "The checks left the tree dirty:"; git status --short; exit 1; fi
	@echo "make check: all good"

# Three at once on two cores: most tests wait for sockets. The simulated worlds take all cores.
BESIDE := --numprocesses 3 --dist worksteal

.PHONY: test
test: $(BIN)/.complete $(CONTRACT)/.complete build/npm/.complete $(if $(CI),setup-wire setup-page setup-redis setup-monitoring setup-deploy setup-image setup-bench build/servers/litellm/.complete) ## Run every test (ARGS="-k name" narrows)
	$(BIN)/pytest $(or $(ARGS),$(BESIDE) --ignore tests/simulation)
	$(if $(ARGS),,$(BIN)/pytest tests/simulation)
	@$(if $(ARGS),,$(call in-clients,test))

.PHONY: faults
faults: $(BIN)/.complete ## Run the fault wall at full length, half an hour (docs/faults.md)
	$(BIN)/pytest tests/faults --long $(ARGS)

.PHONY: simulate
simulate: $(BIN)/.complete ## Simulate a million requests; SEED=7 tells one world again, SEEDS=0:20 runs some, SHARED=0:20 replicas
	@PYTHONPATH=tests $(BIN)/python -m simulation.run $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(CALL),--call $(CALL)) $(if $(SHARED),--shared $(SHARED))

.PHONY: mutants
mutants: $(BIN)/.complete ## Break the source on purpose, see which test notices; writes docs/mutants.md
	@PYTHONPATH=tests $(BIN)/python -m mutation.run $(ARGS)

.PHONY: compatibility
compatibility: $(BIN)/.complete ## Write docs/compatibility.md from ../shared/corpus
	@PYTHONPATH=tests $(BIN)/python -m corpus.compatibility

.PHONY: token-accuracy
token-accuracy: $(BIN)/.complete ## Write docs/tokenizers.md: counts beside those of ../shared/corpus
	@PYTHONPATH=tests $(BIN)/python -m corpus.token_accuracy

.PHONY: fuzz
fuzz: $(BIN)/.complete ## Fuzz what reads upstreams' bytes (FUZZ_SECONDS=600 for each target)
	@PYTHONPATH=tests $(BIN)/python -m fuzz.campaign $(or $(FUZZ_SECONDS),600)

# --- benchmark ----------------------------------------------------------------------
# Figures for docs/performance.md want a quiet machine with two cores: see tests/bench.

BENCH := build/bench
BENCH_SECONDS ?= 5
BENCH_REPEATS ?= 3
BENCH_COOL_SECONDS ?= 60
BENCH_SOAK_MINUTES ?= 1
# The Python of the systems that are written in it, as one that was built as the image's is; .venv's.
BENCH_PYTHON ?=
export BENCH_PYTHON
BENCH_RUN = PYTHONPATH=tests $(BIN)/python -m bench.run --seconds $(BENCH_SECONDS) --repeats $(BENCH_REPEATS) \
	--cool $(BENCH_COOL_SECONDS) --soak-minutes $(BENCH_SOAK_MINUTES)

.PHONY: bench
bench: $(BIN)/.complete setup-bench setup-bench-python ## Measure the gateway beside a bare grpc.aio server and a Go relay (BENCH_SECONDS, BENCH_REPEATS, BENCH_PYTHON)
	@$(BENCH_RUN) $(ARGS)

.PHONY: bench-smoke
bench-smoke: $(BIN)/.complete setup-bench setup-bench-python ## Every scenario in miniature: its figures mean nothing
	@$(BENCH_RUN) --smoke $(ARGS)

.PHONY: bench-peers
bench-peers: $(BIN)/.complete setup-bench setup-bench-python build/servers/litellm/.complete $(BENCH)/portkey/.complete ## The same with LiteLLM and Portkey; writes docs/performance.md
	@$(BENCH_RUN) --peers --publish $(ARGS)

# go sees itself what has changed. -p 2: the memory of others counts, too.
.PHONY: setup-bench
setup-bench: ## Build the benchmark's mock upstream, load generator and relay
	@mkdir -p $(BENCH)
	@(cd tests/bench/go && GOFLAGS="-mod=readonly -buildvcs=false" nice go build -p 2 -o "$(CURDIR)/$(BENCH)/" ./mock ./load ./relay) \
		$(call missing,go cannot build the programs of tests/bench/go)

# An environment for each that BENCH_PYTHON is to run, made anew where that or what is in it changes.
.PHONY: setup-bench-python
BENCHED = gateway:service/requirements.txt
bench-peers: BENCHED += litellm:tests/servers/litellm.txt
setup-bench-python: $(BIN)/.complete
	@test -n "$(BENCH_PYTHON)" || exit 0; case "$(BENCH_PYTHON)" in /*) ;; *) \
		echo "BENCH_PYTHON=$(BENCH_PYTHON): expected an absolute path" >&2; exit 1;; esac; \
	for each in $(BENCHED); do \
		made=$(BENCH)/python/$${each%%:*}; locked=$${each#*:}; \
		wanted="$(BENCH_PYTHON) $$($(BENCH_PYTHON) --version) $$(sha256sum <$$locked)"; \
		test "$$(cat $$made/.complete 2>/dev/null)" != "$$wanted" || continue; \
		echo "Installing $$locked for $(BENCH_PYTHON)..."; rm -rf $$made; \
		$(BIN)/uv venv --quiet --python $(BENCH_PYTHON) $$made; \
		$(BIN)/uv pip install --quiet --compile-bytecode --python $$made/bin/python --require-hashes --no-deps -r $$locked; \
		echo "$$wanted" >$$made/.complete; \
	done

$(BENCH)/portkey/.complete: $(addprefix tests/bench/portkey/,package.json package-lock.json .npmrc patch.py)
	@mkdir -p $(@D)
	@cp $(filter-out %.py,$^) $(@D)
	@npm ci --prefix $(@D) --prefer-offline --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
	@$(PYTHON) tests/bench/portkey/patch.py $(@D)
	@touch $@

# --- use ----------------------------------------------------------------------------

.PHONY: demo
demo: $(BIN)/.complete ## Watch it work: a chat, a batch, a token count, an absorbed 429
	@$(BIN)/tokenwire demo

# One target per job. Scripts do the work; each says in its first lines what it is for.

CLUSTER ?= sock
export CLUSTER

.PHONY: help rust demo bench workload simulate faults soak cycles build payload extension images cluster install plugin lint unit fuzz guest e2e e2e-faults e2e-guest test-images test clean distclean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

rust:
	@.ci/rust

demo: install ## a cluster with sock and the examples, each called and measured beside the same code on runc
	e2e/demo

bench: install ## figures beside those of peers: a table, and target/bench.json
	bench/crun || echo 'crun cannot be had: its figures are left out' >&2
	cargo build --locked --release -p sock-bench
	eval "$$(e2e/cluster/env)" && $(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-musl/release/sock-bench run
	eval "$$(e2e/cluster/env)" && $(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-musl/release/sock-bench tree
	eval "$$(e2e/cluster/env)" && $(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-musl/release/sock-bench tiers
	$(MAKE) workload

workload: install plugin ## sixty Functions on thirty PackageSets, with a tree of zygotes and without: a part of bench
	cargo build --locked --release -p sock-bench
	e2e/images/build target/archives/workload workload-wheels
	e2e/cluster/load target/archives/workload/*.tar
	eval "$$(e2e/cluster/env)" && $(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-musl/release/sock-bench workload $(WORKLOAD)

plugin: rust ## kubectl-sock, a plugin of kubectl: put it on PATH
	cargo build --locked --release -p sock-plan
	@echo $(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-musl/release/kubectl-sock

simulate: rust ## days of requests under different policies for idle leaves: a table, and target/simulate.json; SIMULATE="--days 14"
	cargo build --locked --release -p sock-bench
	$(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-musl/release/sock-bench simulate $(SIMULATE)

build: rust ## every program, for this machine
	cargo build --locked --release

payload: rust ## what the project's images hold, below target/
	.ci/payload

extension: rust ## the zygote's Python extension, for glibc and for musl
	.ci/extension target/payload/opt/sock/lib

images: payload ## archives of all images in target/images/
	e2e/images/build target/archives

cluster: ## a kind cluster (CLUSTER=name), made or reused
	@e2e/cluster/up

install: images cluster ## sock on the cluster, with the wheel index of the tests
	e2e/cluster/install target/archives

lint: rust ## all checks that run nothing
	.ci/lint

unit: payload ## unit tests and, as root, the integration tests that need no cluster
	cargo test --locked --workspace --exclude sock-e2e --exclude sock-zygote-extension

fuzz: rust ## what nobody has written down, to every parser: FUZZ_SECONDS=60 for each target of fuzz/
	.ci/fuzz

guest: rust ## integration tests of sandbox and shim in a guest with cgroup v2
	e2e/guest/test

test-images: cluster
	e2e/images/build target/archives/tests old-python new-python musl-python
	e2e/cluster/load target/archives/tests/*.tar
	e2e/images/build target/archives/cri critest
	e2e/containerds/build target/archives/containerds
	e2e/docker/take target/archives/docker

# Tests on the cluster wait more than they compute, but more at once only make each other late.
# Those that look at whole nodes come last, one after the other.
e2e: install test-images ## end-to-end tests on the cluster
	cargo build --locked -p sock-plan -p sock-bench
	export RUST_BACKTRACE=0 RUST_TEST_THREADS=2; \
	cargo test --locked -p sock-e2e --no-fail-fast --test pods --test functions --test isolation --test hostile --test failures --test input --test upgrades --test tree --test plan --test cache; status=$$?; \
	for alone in soak faults nodes memory ctr containerds docker cri guest deletion uninstall; do cargo test --locked -p sock-e2e --test $$alone -- --test-threads 1 || status=$$?; done; \
	exit $$status

e2e-faults: install ## every fault once, as tests; a part of e2e
	cargo build --locked -p sock-bench && RUST_BACKTRACE=0 cargo test --locked -p sock-e2e --test faults -- --test-threads 1

e2e-guest: install ## a node that is an emulated machine with systemd and cgroup v2; a part of e2e
	RUST_BACKTRACE=0 cargo test --locked -p sock-e2e --test guest

faults: install ## what faults cost, many rounds of each: a table, and target/faults.json; FAULTS="--only leaf"
	cargo build --locked --release -p sock-bench
	eval "$$(e2e/cluster/env)" && $(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-musl/release/sock-bench faults $(FAULTS)

soak: install ## twenty Functions under load for an hour (SOAK_SECONDS), with an account of what is kept
	SOAK_SECONDS=$(or $(SOAK_SECONDS),3600) cargo test --locked -p sock-e2e --test soak -- --nocapture

cycles: install ## two thousand containers by ctr, eight at once, and an account of the node (CYCLES)
	CYCLES=$(or $(CYCLES),2000) cargo test --locked -p sock-e2e --test ctr -- --nocapture --test-threads 1

test: lint unit fuzz guest e2e ## the whole suite

clean: ## the cluster and all that it changed on this machine; PURGE=1 drops the caches too
	e2e/cluster/down $(if $(PURGE),--purge)

distclean: ## every cluster, the caches, and target/
	e2e/cluster/down --all --purge
	cargo clean

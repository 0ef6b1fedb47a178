# Everything a newcomer needs; each target installs what it lacks (Debian) and can be repeated.
SHELL := /bin/bash
CARGO ?= cargo
export RUST_BACKTRACE ?= 0

.PHONY: demo test test-vm lint bench fuzz release prepare

prepare:
	@./.ci/prepare

# A mixed three-node cluster that runs the examples, and is taken down again.
demo: prepare
	$(CARGO) build --release -p sampan
	./examples/demo.sh "$$($(CARGO) metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/sampan"

test: prepare
	$(CARGO) build
	$(CARGO) test --workspace

# Clusters of virtual machines (qemu's emulation, no KVM): stock Debian with systemd, amd64 and arm64. Half an hour and more.
test-vm:
	@./.ci/prepare release
	@./.ci/prepare vm
	$(CARGO) xtask release --only amd64
	$(CARGO) xtask release --only arm64
	SAMPAN_BIN="$$($(CARGO) metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/dist/sampan-amd64" \
	  $(CARGO) test -p sampan-tests --test vm -- --ignored

lint: prepare
	$(CARGO) xtask tidy
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# The budgets of ARCHITECTURE.md, measured with the release binary; writes target/bench/budgets.json.
bench: prepare
	$(CARGO) build --release -p sampan -p sampan-bench
	@"$$($(CARGO) metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/sampan-bench" budgets

# Static binaries for x86_64, aarch64 and armv7 in <target folder>/dist; each is run, under emulation where it must be.
release:
	@./.ci/prepare release
	$(CARGO) xtask release

# Every parser of foreign bytes, FUZZ_SECONDS each; needs cargo-fuzz, which works with the stable compiler here.
FUZZ_SECONDS ?= 30
fuzz:
	@$(CARGO) fuzz --version >/dev/null 2>&1 || { echo "make fuzz needs cargo-fuzz: cargo install cargo-fuzz" >&2; exit 1; }
	cd fuzz && for target in $$($(CARGO) fuzz list); do \
	  echo "== $$target"; \
	  $(CARGO) fuzz run -s none --features libfuzzer "$$target" -- -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=1024 -verbosity=0 || exit 1; \
	done

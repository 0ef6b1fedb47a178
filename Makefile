# Everything a newcomer needs; each target installs what it lacks (Debian) and can be repeated.
SHELL := /bin/bash
CARGO ?= cargo
export RUST_BACKTRACE ?= 0

.PHONY: demo test lint bench fuzz release prepare

prepare:
	@./.ci/prepare

# A mixed three-node cluster that runs the examples, and is taken down again.
demo: prepare
	$(CARGO) build --release
	./examples/demo.sh "$$($(CARGO) metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/sampan"

test: prepare
	$(CARGO) build
	$(CARGO) test --workspace

lint: prepare
	$(CARGO) xtask tidy
	$(CARGO) clippy --workspace --all-targets -- -D warnings

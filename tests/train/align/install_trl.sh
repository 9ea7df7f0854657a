#!/usr/bin/env bash
# Makes .trl/: an environment on top of .venv with TRL (losses of alignment), math-verify and reasoning-gym (verifiers), to compare
# with. 200 MB, a minute.
set -euo pipefail
cd "$(dirname "$0")/../../.."
want="trl==1.16.0 accelerate==1.12.0 math-verify==0.9.0 reasoning-gym==0.1.19"
if [ -f .trl/.installed ] && [ "$(cat .trl/.installed)" = "$want" ]; then exit 0; fi
echo "Fetching TRL, math-verify and reasoning-gym, about a minute, once ..."
rm -rf .trl
.venv/bin/python -m venv --without-pip .trl
packages=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
echo "$packages" >"$(.trl/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beneath.pth"
.venv/bin/python -m pip --python .trl/bin/python install --quiet $want
echo "$want" >.trl/.installed

#!/usr/bin/env bash
# Makes .trl/: an environment on top of .venv with TRL, another implementation of supervised fine-tuning and of its mask, to
# compare with. 20 MB, half a minute.
set -euo pipefail
cd "$(dirname "$0")/../../.."
want="trl==1.16.0 accelerate==1.12.0"
if [ -f .trl/.installed ] && [ "$(cat .trl/.installed)" = "$want" ]; then exit 0; fi
echo "Fetching TRL, half a minute, once ..."
rm -rf .trl
.venv/bin/python -m venv --without-pip .trl
packages=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
echo "$packages" >"$(.trl/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beneath.pth"
.venv/bin/python -m pip --python .trl/bin/python install --quiet $want
echo "$want" >.trl/.installed

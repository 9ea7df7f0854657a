#!/usr/bin/env bash
# install_on_top.sh FOLDER NAMES PACKAGE==VERSION...: makes FOLDER, an environment on top of .venv with more packages. Does nothing if
# it has these packages already.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 names=$2
shift 2
if [ -f "$folder/.installed" ] && [ "$(cat "$folder/.installed")" = "$*" ]; then exit 0; fi
echo "Fetching $names, about a minute, once ..."
rm -rf "$folder"
.venv/bin/python -m venv --without-pip "$folder"
packages=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
echo "$packages" >"$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beneath.pth"
.venv/bin/python -m pip --python "$folder/bin/python" install --quiet "$@"
echo "$*" >"$folder/.installed"

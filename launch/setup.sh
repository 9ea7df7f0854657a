#!/usr/bin/env bash
# Makes .venv and installs this project into it; a second call finds it done and says nothing.
#
#   bash launch/setup.sh                  set up
#   bash launch/setup.sh --find-python    only print the Python that would be used
set -euo pipefail
cd "$(dirname "$0")/.."

runs() { # does this candidate run, and is it a Python we support, able to make environments?
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not ((3, 12) <= sys.version_info[:2] < (3, 14)))' >/dev/null 2>&1
}

find_python() {
  local candidate
  # A pyenv shim can exist and fail: every candidate is run, not just looked for.
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    if runs "$candidate"; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  echo "No Python 3.12 or 3.13 with the venv module was found. Install one (Debian: apt-get install python3.12-venv; or" \
    "pyenv install 3.12), or name it: make PYTHON=/path/to/python3.12 setup" >&2
  return 1
}

if [ "${1:-}" = "--find-python" ]; then
  find_python
  exit
fi

extras=dev
# A working driver means a GPU: then the kernels for it are wanted too. (This branch has not been run on a GPU machine.)
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then extras=dev,gpu; fi

# The editable install knows the top-level packages of the day it was made, so a new one makes it stale too.
want="$({ cat pyproject.toml constraints.txt; ls -- */__init__.py || true; } 2>/dev/null | sha256sum | cut -d' ' -f1) $extras $PWD"
stamp=.venv/.stratum-installed
if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then exit 0; fi

if [ ! -x .venv/bin/python ] || ! runs .venv/bin/python; then
  python=$(find_python)
  free_kb=$(df -Pk . | awk 'NR==2 {print $4}')
  if [ "$free_kb" -lt 8000000 ]; then
    echo "Only $((free_kb / 1000000)) GB free here; the environment needs about 8 GB (torch with its CUDA libraries)." >&2
    exit 1
  fi
  if [ -e .venv ] && [ ! -f .venv/.stratum-made ]; then
    echo ".venv exists but holds no working Python 3.12 or 3.13, and was not made by this script: move it away first." >&2
    exit 1
  fi
  echo "Making .venv with $python ..."
  rm -rf .venv
  "$python" -m venv .venv
  touch .venv/.stratum-made
fi

rm -f "$stamp" # what follows may be interrupted; only a finished install is believed
echo "Installing torch, Megatron-Core and friends into .venv: 1 to 5 minutes and about 6 GB, once ..."
start=$SECONDS
pip_setting() { # a setting of the user's pip (environment, then configuration files); empty if there is none
  local variable="PIP_$(tr 'a-z-' 'A-Z_' <<<"$1")"
  echo "${!variable:-$(.venv/bin/python -m pip config get "global.$1" 2>/dev/null || true)}"
}
with_uv() { # uv resolves and unpacks this set several times faster than pip (docs/log.md). It does not read pip's settings.
  local uv index one
  if ! uv=$(command -v uv); then
    .venv/bin/python -m pip install --quiet 'uv<1' || return
    uv=.venv/bin/uv
  fi
  index=$(pip_setting index-url)
  if [ -n "$index" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="$index"; fi
  if [ -z "${UV_INDEX:-}" ]; then
    # Of several indexes pip takes the best version, uv by default the first that has the package. pip's local folders are left out.
    for one in $(pip_setting extra-index-url); do
      case $one in http*) UV_INDEX="${UV_INDEX:+$UV_INDEX }$one" ;; esac
    done
    if [ -n "${UV_INDEX:-}" ]; then export UV_INDEX UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"; fi
  fi
  if [ -n "$(pip_setting cert)" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$(pip_setting cert)"; fi
  "$uv" pip install --python .venv/bin/python --constraint constraints.txt "$@"
}
with_pip() {
  # An old pip backtracks for minutes on this set of packages, so it is upgraded first.
  .venv/bin/python -m pip install --quiet --upgrade pip || return
  .venv/bin/python -m pip install --constraint constraints.txt "$@"
}
either() {
  with_uv "$@" && return
  echo "uv is not here or failed (its message is above): installing with pip, which takes longer ..." >&2
  with_pip "$@"
}
install() {
  if [ "$extras" = dev,gpu ]; then
    # mamba-ssm and causal-conv1d compile against the installed torch, so torch comes first and isolation is off.
    either torch setuptools ninja wheel || return
    either --no-build-isolation --editable ".[$extras]"
  else
    either --editable ".[$extras]"
  fi
}
if ! install; then
  echo "The installation failed; the message is above. With the network back or the cause fixed, run the same command" \
    "again: it continues from here." >&2
  exit 1
fi
echo "$want" >"$stamp"
echo "Installed in $((SECONDS - start)) s."

#!/usr/bin/env bash
# Builds the docs into runs/site. MkDocs gets an environment of its own, .docs, from the `docs` extra: it needs no torch.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$(bash launch/setup.sh --find-python)
wanted=$("$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
if [ "$(cat .docs/.installed 2>/dev/null)" != "$wanted" ]; then
  rm -rf .docs
  "$python" -m venv .docs
  # shellcheck disable=SC2086  # one word a package
  .docs/bin/python -m pip install --quiet --disable-pip-version-check $wanted
  echo "$wanted" > .docs/.installed
fi
# Without this variable, Material for MkDocs prints at each build that it ends in May 2027 (docs/contributing.md has the plan).
NO_MKDOCS_2_WARNING=1 .docs/bin/python -m mkdocs build --strict --clean --config-file docs/site/mkdocs.yml
echo "Open runs/site/index.html"

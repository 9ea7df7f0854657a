#!/usr/bin/env bash
# Debian's Chromium for tests/browser.py, installed as root. Where that cannot be done, the tests that need a browser skip.
set -uo pipefail
if command -v chromium >/dev/null; then exit 0; fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "No Chromium here, and it cannot be installed: the tests of pages skip." >&2
  exit 0
fi
log=$(mktemp)
{ apt-get install -y --no-install-recommends chromium || { apt-get update && apt-get install -y --no-install-recommends chromium; }; } \
  >"$log" 2>&1 || { echo "Chromium could not be installed: the tests of pages skip." >&2; tail -n 3 "$log" >&2; }
rm -f "$log"

#!/usr/bin/env bash
# Fetches s3fs, and moto's server that speaks S3, into .s3/ (350 MB): s3fs wants an fsspec of its own release, which is not the
# one that this project is tested with. Where they cannot be fetched it says so, and the test skips.
set -euo pipefail
cd "$(dirname "$0")/../.."
client="s3fs==2026.7.0"
server="moto[s3,server]==5.2.5"
want="$client $server"
if [ -f .s3/.installed ] && [ "$(cat .s3/.installed)" = "$want" ]; then exit 0; fi
echo "Fetching s3fs and moto, about a minute, once ..."
rm -rf .s3
# Neither folder is part of .venv, whose packages pip would otherwise compare with.
if .venv/bin/python -m pip install --quiet --no-warn-conflicts --target .s3/client $client &&
  .venv/bin/python -m pip install --quiet --no-warn-conflicts --target .s3/server $server; then
  echo "$want" >.s3/.installed
else
  rm -rf .s3
  echo "The S3 test will be skipped: s3fs and moto cannot be fetched here; pip's message is above."
fi

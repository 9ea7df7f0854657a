#!/usr/bin/env bash
# Fetches s3fs, and moto's server that speaks S3, into .s3/ (350 MB): s3fs wants an fsspec of its own release, which is not the
# one that this project is tested with.
set -euo pipefail
cd "$(dirname "$0")/../.."
client="s3fs==2026.7.0"
server="moto[s3,server]==5.2.5"
want="$client $server"
if [ -f .s3/.installed ] && [ "$(cat .s3/.installed)" = "$want" ]; then exit 0; fi
echo "Fetching s3fs and moto, about a minute, once ..."
rm -rf .s3
.venv/bin/python -m pip install --quiet --target .s3/client $client
.venv/bin/python -m pip install --quiet --target .s3/server $server
echo "$want" >.s3/.installed

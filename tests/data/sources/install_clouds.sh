#!/usr/bin/env bash
# Fetches the `remote` extra's s3fs and gcsfs, moto's server that speaks S3, an emulator of Google's storage, and the schemas of
# Kubernetes and JobSet into .clouds/ (560 MB), each apart from .venv. Where they cannot be fetched it says so, and the tests skip.
set -euo pipefail
cd "$(dirname "$0")/../../.."
client="s3fs==2026.9.0 gcsfs==2026.10.1"
s3="moto[s3,server]==5.2.5"
gs="gcp-storage-emulator==2026.7.19"
kubernetes="kubernetes-validate==1.37.0 kubeflow-trainer-api==2.3.0"
want="$client $s3 $gs $kubernetes"
if [ -f .clouds/.installed ] && [ "$(cat .clouds/.installed)" = "$want" ]; then exit 0; fi
echo "Fetching s3fs, gcsfs, two servers and schemas, about two minutes, once ..."
rm -rf .clouds
# No folder is part of .venv, whose packages pip would otherwise compare with.
fetch() { .venv/bin/python -m pip install --quiet --no-warn-conflicts --target "$@"; }
if fetch .clouds/client --constraint constraints.txt $client && fetch .clouds/s3 $s3 && fetch .clouds/gs $gs \
  && fetch .clouds/kubernetes importlib-resources $kubernetes; then
  echo "$want" >.clouds/.installed
else
  rm -rf .clouds
  echo "The tests with S3, Google's storage and Kubernetes' schemas will be skipped: they cannot be fetched here; pip's message is above."
fi

#!/usr/bin/env bash
# Fetches mamba-ssm and causal-conv1d into .oracle/, built without CUDA: their torch references and Triton kernels are what
# the oracle tests compare with. Kept out of .venv, where Megatron would take their presence for a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
want="mamba-ssm==2.3.2.post1 causal-conv1d==1.6.2.post1"
if [ -f .oracle/.installed ] && [ "$(cat .oracle/.installed)" = "$want" ]; then exit 0; fi
echo "Fetching $want for the oracle tests, about a minute, once ..."
rm -rf .oracle
.venv/bin/python -m pip install --quiet ninja wheel
# FORCE_BUILD: else the set-up scripts look for prebuilt CUDA wheels; SKIP_CUDA_BUILD: else they want nvcc.
MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
  .venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --target .oracle $want
echo "$want" >.oracle/.installed

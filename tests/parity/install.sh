#!/usr/bin/env bash
# Fetches what the oracle tests compare with, into .oracle/, built without CUDA and kept out of .venv, where Megatron would
# take their presence for a GPU:
#   .oracle/             mamba-ssm and causal-conv1d: torch references and Triton kernels
#   .oracle/precision/   Transformer Engine's Python layer, torchao: reference quantisers
set -euo pipefail
cd "$(dirname "$0")/../.."
want="mamba-ssm==2.3.2.post1 causal-conv1d==1.6.2.post1"
engine="transformer-engine==2.20.2 transformer-engine-cu13==2.20.2"
formats="torchao==0.18.0 onnxscript==0.7.2 onnx==1.23.2 onnx_ir==1.1.0 nvdlfw-inspect==0.2.2 ml_dtypes==0.6.0"
if [ -f .oracle/.installed ] && [ "$(cat .oracle/.installed)" = "$want $engine $formats" ]; then exit 0; fi
echo "Fetching the oracle tests' packages, about a minute, once ..."
rm -rf .oracle
.venv/bin/python -m pip install --quiet ninja wheel
# FORCE_BUILD: else the set-up scripts look for prebuilt CUDA wheels; SKIP_CUDA_BUILD: else they want nvcc.
MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
  .venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --target .oracle $want
# Only the Python files of Transformer Engine are used; its 700 MB of compiled kernels need a GPU.
.venv/bin/python -m pip install --quiet --no-deps --target .oracle/precision $engine $formats
find .oracle/precision/transformer_engine -name "*.so*" -delete
echo "$want $engine $formats" >.oracle/.installed

#!/usr/bin/env bash
# Fetches the loaders that `make bench-data` compares with, each into a folder of its own under .peers/, without their
# dependencies: installed beside ours they would move torch, numpy and transformers.
#   .peers/litdata     litdata
#   .peers/streaming   mosaicml-streaming; torchvision, which it imports and a loader of tokens never calls, is a stub
# Megatron-Core, datasets and numpy come from .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."
litdata="litdata==0.2.76 lightning-utilities==0.15.2 tifffile==2026.3.3 obstore==0.8.2"
cloud="boto3==1.40.76 botocore==1.40.76 s3transfer==0.14.0 jmespath==1.0.1"
streaming="mosaicml-streaming==0.13.0 Brotli==1.2.0 python-snappy==0.7.3 cramjam==2.11.0 zstd==1.5.7.2 catalogue==2.0.10"
if [ -f .peers/.installed ] && [ "$(cat .peers/.installed)" = "$litdata $cloud $streaming" ]; then exit 0; fi
echo "Fetching the loaders to compare with, some seconds, once ..."
rm -rf .peers
.venv/bin/python -m pip install --quiet --no-deps --target .peers/litdata $litdata $cloud
.venv/bin/python -m pip install --quiet --no-deps --target .peers/streaming $streaming $cloud
mkdir -p .peers/streaming/torchvision/{datasets,transforms}
echo "" >.peers/streaming/torchvision/__init__.py
echo "class VisionDataset: ...
class CIFAR10: ...
class ImageFolder: ..." >.peers/streaming/torchvision/datasets/__init__.py
echo "" >.peers/streaming/torchvision/transforms/__init__.py
echo "def to_tensor(picture): raise NotImplementedError" >.peers/streaming/torchvision/transforms/functional.py
echo "$litdata $cloud $streaming" >.peers/.installed

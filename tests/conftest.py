"""Set-up of every test: one thread, Megatron importable without CUDA, no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import torch

from train.parallel.device import prepare

torch.set_num_threads(1)
if os.environ.get("STRATUM_TEST_TE") == "1":
    from parity import te_on_cpu

    te_on_cpu.install()
prepare(torch.device("cpu"))

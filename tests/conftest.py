"""Set-up of every test: one thread, Megatron importable without CUDA, no network, no time limits on generated examples."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # of a background job; commands that tests start would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(  # no deadline: a slow machine is not a fault; if $CI is set, the rest is Hypothesis's CI profile
    "stratum", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("stratum")
torch.set_num_threads(1)
if os.environ.get("STRATUM_TEST_TE") == "1":
    from parity import te_on_cpu

    te_on_cpu.install()

# After the stand-in for Transformer Engine, which reports a GPU, and before any test imports Megatron.
from train.megatron import use_device

use_device(torch.device("cpu"))

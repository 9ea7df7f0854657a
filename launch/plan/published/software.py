"""Programs whose speed is published: what they hide and waste beside the kernels, and which one a row speaks of.

The numbers are fitted, like those of `launch.plan.cost.efficiency`: docs/plan.md lists the rows, tests/bench/planner_fit.py fits.
"""

import re
from dataclasses import replace

from launch.plan.cost.efficiency import Shards, Software
from launch.plan.published.cells import whole

Row = dict[str, str]


def software_of(row: Row, generation: str, *, is_hybrid: bool = False) -> Software:
    """The program that ran, as far as a row tells: who publishes, and words like `zero-3` and `async`."""
    source, extra = row.get("src", "").lower(), row.get("extra", "").lower()
    shards = shards_of(row)
    if any(name in source for name in ("llm-foundry", *PLAIN_TORCH)):
        base = FOUNDRY_HOPPER if generation == "hopper" else FOUNDRY
        return replace(base, shards=shards)
    if "torchtitan" in source:
        base = TITAN_HOPPER if generation == "hopper" else TITAN
        return replace(base, hides_tensor=TUNED.hides_tensor if "async" in extra else 0.0, shards=shards)
    if "nanotron" in source:
        return NANOTRON
    return replace(TUNED, shards=shards, hides_tensor=0.0 if is_hybrid else TUNED.hides_tensor)


def shards_of(row: Row) -> Shards:
    """What data-parallel ranks divide, from the columns fsdp and zero and words of extra."""
    extra, zero, fsdp = (row.get(name, "").lower() for name in ("extra", "zero", "fsdp"))
    if "shard_grad_op" in extra or re.search(r"zero[- ]?2", extra) or re.search(r"\b(zero[- ]?)?2\b", zero):
        return "gradients"
    # Megatron-Bridge 25.11 writes 1 for "with FSDP"; elsewhere 1 is a degree.
    is_on = bool(re.search(r"yes|true|on\b|[fh]sdp", fsdp)) or (fsdp == "1" and "bridge" in row.get("src", "").lower())
    if is_on or (whole(fsdp) or 0) > 1 or "full_shard" in extra:
        return "parameters"
    in_words = re.search(r"zero[- ]?3", extra) or re.search(r"\b(zero[- ]?)?3\b", zero)
    return "parameters" if in_words or (not fsdp and re.search(r"\b(fsdp2?|hsdp)\b", extra)) else "optimizer"


PLAIN_TORCH = (
    "litgpt",
    "lit-gpt",
    "accelerate",
    "deepspeed",
    "transformers",
    "fabric",
    "olmo",
    "composer",
    "colossal",
    "gpt-neox",
    "fms-fsdp",
    "torchtune",
    "lingua",
    "levanter",
    "maxtext",
    "paxml",
)
"""Programs whose modules are plain torch or JAX; taken to be as fast as llm-foundry."""
TUNED = Software("Megatron-Core, tuned", hides_tensor=0.9)
"""NVIDIA's own runs and others on Megatron-Core: tensor-parallel traffic beside products, fused kernels. That of hybrids is
not hidden: their recipes set up no overlap."""
TITAN = Software("torchtitan", elementwise=1.74, products=0.92)
TITAN_HOPPER = replace(TITAN, attention=0.705)
"""With and without torch.compile: fitted apart, the two came out alike."""
FOUNDRY = Software("llm-foundry", elementwise=1.74, gradient_bytes=2)
"""Plain torch modules in bf16 under FSDP, FlashAttention 2."""
FOUNDRY_HOPPER = replace(FOUNDRY, products=0.762, attention=0.705)
"""The same in 2023 on a then new GPU: kernels of Ampere's generation."""
NANOTRON = Software("nanotron", elementwise=1.74, attention=0.705, bucket_bytes=25e6, bucket_bytes_per_rank=0)

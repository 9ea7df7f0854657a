"""Programs with published speed: what each overlaps and how much slower it is, and which program a row is about.

tests/bench/planner_fit.py fits the numbers together with those of `launch.plan.cost.efficiency`; docs/plan.md lists the rows.
"""

import re
from dataclasses import replace

from launch.plan.cost.device import Device
from launch.plan.cost.efficiency import Shards, Software
from launch.plan.published.cells import integer
from recipes.schema.layout import Layout
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds

Row = dict[str, str]


def software_of(row: Row, device: Device, *, model: ModelConfig, layout: Layout) -> Software:
    """The program of a row, by its publisher, by words such as `zero-3` and `async`, and by what its public recipes switch on."""
    generation, kinds = device.generation, layer_kinds(model.pattern)
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
    return replace(
        TUNED,
        shards=shards,
        hides_tensor=0.0 if "M" in kinds else TUNED.hides_tensor,
        # Recipes for GB200 and GB300 capture router and dispatch in CUDA graphs; experts of fixed capacity need no counts.
        expert_s=GRAPH_S
        if device.domain > device.node or re.search("token ?drop", row["model"].lower())
        else TUNED.expert_s,
        hides_exchange=HIDES_EXCHANGE if layout.virtual > 1 else 0.0,
    )


def shards_of(row: Row) -> Shards:
    """What data-parallel ranks shard, by the columns fsdp and zero and by words in the column extra."""
    extra, zero, fsdp = (row.get(name, "").lower() for name in ("extra", "zero", "fsdp"))
    if "shard_grad_op" in extra or re.search(r"zero[- ]?2", extra) or re.search(r"\b(zero[- ]?)?2\b", zero):
        return "gradients"
    # In Megatron-Bridge 25.11, 1 means "with FSDP"; elsewhere it is a degree.
    is_on = bool(re.search(r"yes|true|on\b|[fh]sdp", fsdp)) or (fsdp == "1" and "bridge" in row.get("src", "").lower())
    if is_on or (integer(fsdp) or 0) > 1 or "full_shard" in extra:
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
"""Publishers that use plain torch or JAX modules; assumed to be as fast as llm-foundry."""
TUNED = Software("Megatron-Core, tuned", hides_tensor=0.9)
"""NVIDIA's and other runs on Megatron-Core: fused kernels, and tensor-parallel traffic that overlaps with products. In
hybrids the traffic does not overlap, because their recipes do not enable it."""
GRAPH_S = 1.38e-3
"""`Software.expert_s` with CUDA graphs, or with a fixed number of rows for each expert. Fitted."""
HIDES_EXCHANGE = 0.9
"""Megatron-Core overlaps the exchange with another microbatch's products, which needs virtual stages."""
TITAN = Software("torchtitan", elementwise=1.74, products=0.92)
TITAN_HOPPER = replace(TITAN, attention=0.705)
"""With and without torch.compile: separate fits gave the same values."""
FOUNDRY = Software("llm-foundry", elementwise=1.74, gradient_bytes=2)
"""Plain torch modules in bf16 under FSDP, FlashAttention 2."""
FOUNDRY_HOPPER = replace(FOUNDRY, products=0.762, attention=0.705)
"""The same in 2023, when the GPU was new and ran kernels written for Ampere."""
NANOTRON = Software("nanotron", elementwise=1.74, attention=0.705, bucket_bytes=25e6, bucket_bytes_per_rank=0)

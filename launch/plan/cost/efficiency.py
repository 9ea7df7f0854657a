"""The constants of the time model: efficiencies of GPUs, and what each program overlaps or wastes.

Some are fitted so that predicted times match published ones; docs/plan.md lists the rows. Everything else in
`launch.plan.cost` is counted or comes from a data sheet.
"""

from dataclasses import dataclass, field
from typing import Literal

Shards = Literal["optimizer", "gradients", "parameters"]
"""What data-parallel ranks divide: optimizer state (ZeRO-1), gradients too (2), parameters too (ZeRO-3, FSDP)."""


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the data sheet's peaks that large kernels reach."""

    gemm: dict[str, dict[str, float]] = field(
        default_factory=lambda: {
            "ampere": {"bf16": 0.784, "fp32": 0.80},
            "ada": {"bf16": 0.70, "fp8": 0.60, "fp32": 0.80},
            "hopper": {"bf16": 0.749, "fp8": 0.769, "fp32": 0.80},
            "blackwell": {"bf16": 0.53, "fp8": 0.572, "fp4": 0.40, "fp32": 0.80},
            "blackwell_ultra": {"bf16": 0.53, "fp8": 0.903, "fp4": 0.50, "fp32": 0.80},
        }
    )
    """Matrix products: fraction of the format's peak, before tails and memory traffic. Fitted: ampere, hopper and blackwell,
    blackwell_ultra fp8. The others are set by hand (blackwell_ultra bf16: the value of blackwell)."""
    attention: dict[str, float] = field(
        default_factory=lambda: {
            "ampere": 0.303,
            "ada": 0.303,
            "hopper": 0.309,
            "blackwell": 0.423,
            "blackwell_ultra": 0.423,
        }
    )
    """Fused attention, forward and backward: fraction of the bf16 peak. Fitted, except ada (the value of ampere)."""
    scan: float = 0.15
    """The chunked scan: fraction of the bf16 peak. Set by hand: the scan is 3 to 6 % of the step of the only dense hybrid with
    published speed (Nemotron-H 56B), and 0.10 and 0.25 fit its rows equally well."""
    hbm: float = 0.80
    """Elementwise kernels: fraction of the memory bandwidth."""
    link: float = 0.80
    """Collectives inside a domain: fraction of the link's bandwidth."""
    network: float = 0.80
    """Collectives between domains: fraction of the network cards' bandwidth."""
    jitter: float = 0.008
    """Fraction of time lost for each doubling of the number of nodes (stragglers, longer rings)."""
    tail: float = 0.5
    """Share of a wave of tiles that a matrix product wastes at its end, on average."""
    route: float = 1.36
    """Sorting rows by expert and back: memory traffic relative to reading and writing each row once. Fitted."""
    expert_hybrid: float = 4.04
    """Elementwise kernels of hybrids with experts: memory traffic relative to fused kernels, whatever the program. Fitted. The
    cause is not known; dense hybrids do not need it."""
    kernel_s: float = 4e-6
    """Seconds from the end of one kernel to the start of the next."""
    hop_s: float = 10e-6
    """Latency of a ring collective for each domain, in seconds."""


@dataclass(frozen=True)
class Software:
    """A training program: what it overlaps, and how much slower its kernels are."""

    name: str
    elementwise: float = 1.0
    """Memory traffic, relative to fused kernels."""
    products: float = 1.0
    """Speed of its matrix products, relative to the best of the generation."""
    attention: float = 1.0
    """Speed of its attention kernels, relative to the best of the generation."""
    bucket_bytes: float = 160e6
    """Gradients are reduced in buckets of this size (Megatron-Core: 40 million fp32 elements) ..."""
    bucket_bytes_per_rank: float = 4e6
    """... or of this size for each data-parallel rank, if that is more (Megatron-Core: a million elements)."""
    shards: Shards = "optimizer"
    """What its data-parallel ranks shard."""
    hides_tensor: float = 0.0
    """Share of tensor-parallel traffic that overlaps with matrix products."""
    hides_data: float = 0.95
    """Share of data-parallel traffic that may overlap with matrix products."""
    expert_s: float = 2.88e-3
    """Seconds of an expert layer, forward and backward, that do not depend on its tokens: the host waits for the counts of the
    experts and starts many small kernels (arXiv 2603.07685 names the cause). Fitted."""
    hides_exchange: float = 0.0
    """Share of the traffic to and from experts that overlaps with products of another microbatch."""
    gradient_bytes: int = 4
    """Bytes of one gradient in the reduction."""


MEGATRON = Software("Megatron-Core")

STRATUM = Software("Stratum", elementwise=1.74)
"""This project's trainer; not measured. Its norms are fused with products (Transformer Engine). Its other elementwise work is
plain torch, so the constant of llm-foundry is used. Tensor-parallel traffic does not overlap."""

"""Memory and speed switches of Megatron-Core that a recipe does not have: what each does here, and what to use instead.

Some of them (`silent`) are accepted by Megatron and change nothing on this project's models or loop; those were tried
(docs/megatron.md).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Switch:
    """Why a switch of Megatron is not a recipe field."""

    why: str
    instead: str
    silent: bool = False
    """Whether Megatron accepts it and nothing happens."""


_GRAPHS = Switch(
    "CUDA graphs are captured by Megatron's own training loop. With another loop, as here, the switch changes nothing.",
    "Leave it out.",
    silent=True,
)
_FSDP = Switch(
    "FSDP is not supported: torch's fully_shard gives no gradient to conv1d, dt_bias, A_log and D of Mamba-2 layers, without an "
    "error.",
    "The optimizer state is always sharded over the data-parallel ranks. To shard weights use parallel.tensor, pipeline or "
    "expert.",
    silent=True,
)
SWITCHES = {
    "cuda_graph_impl": _GRAPHS,
    "cuda_graph_scope": _GRAPHS,
    "cuda_graph_modules": _GRAPHS,
    "enable_cuda_graph": _GRAPHS,
    "cpu_offloading": Switch(
        "Megatron's activation offload is part of its transformer stack. The stack of hybrids ignores it.",
        "Use parallel.recompute=full.",
        silent=True,
    ),
    "use_megatron_fsdp": _FSDP,
    "use_torch_fsdp2": _FSDP,
    "fsdp": _FSDP,
    "data_parallel_sharding_strategy": _FSDP,
    "fine_grained_activation_offloading": Switch(
        "It needs Transformer Engine's offload and has no hooks in Mamba-2 layers.", "Use parallel.recompute=full."
    ),
    "optimizer_cpu_offload": Switch(
        "Megatron's optimizer on the host refuses fp32 weights with a distributed optimizer (a non-leaf tensor).",
        "Use more data-parallel ranks: each has its share of the optimizer state.",
    ),
    "recompute_granularity": Switch("It is called parallel.recompute.", "Use parallel.recompute=full or none."),
    "recompute_modules": Switch(
        "Recomputation by module is not a recipe field yet; Megatron has no module for Mamba-2 layers.",
        "Use parallel.recompute=full.",
    ),
    "recompute_num_layers": Switch("Every layer is recomputed by itself.", "Use parallel.recompute=full."),
    "tp_comm_overlap": Switch(
        "It needs Transformer Engine's user buffers on GPUs and was not tried here.",
        "Use parallel.sequence=true with few tensor ranks.",
    ),
    "overlap_moe_expert_parallel_comm": Switch(
        "It needs Megatron's schedule plans, which hybrids do not have.", "Keep expert ranks inside one NVLink domain."
    ),
}


def about_switch(key: str) -> str:
    """What a key's last part means if it is one of Megatron's switches, and what to use; else "". `model.cpu_offloading`,
    `parallel.cpu-offloading` and `ddp.cpu_offloading` are the same switch."""
    switch = SWITCHES.get(key.split(".")[-1].replace("-", "_"))
    return "" if switch is None else f"{switch.why} {switch.instead}"

"""Process groups: from a layout of degrees to Megatron's groups, as one `Mesh` object.

Megatron stores its groups in module globals; `open_mesh` creates them and copies them once into a `Mesh`. No module outside
this package reads the globals. `close_mesh` destroys the groups, so one process can run several recipes in sequence.

Invariant: every group of a run is created here, by every rank, in the same order. torch numbers groups by a counter in each
process and uses the number in the group's name, so a rank that skips one group waits for ever in the next one.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from recipes.schema.layout import Layout
from recipes.schema.teacher_placement import placement_of


@dataclass(frozen=True)
class TeacherGroups:
    """The groups of a distillation's teacher on this rank of the last pipeline stage."""

    alone: dist.ProcessGroup
    """This rank only: the pipeline and context group of the teacher's model."""
    tensor: dist.ProcessGroup
    """The ranks that share one copy of the teacher."""
    replicas: dist.ProcessGroup
    """The ranks that have the same part of the teacher's weights."""
    everyone: dist.ProcessGroup
    """All ranks of the last stage."""
    exchange: dist.ProcessGroup
    """One rank of each teacher that serves the same rows."""


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Mesh:
    """This process's rank and its process groups."""

    layout: Layout
    rank: int
    device: torch.device
    groups: ProcessGroupCollection
    saving: dist.ProcessGroup | None = None
    """All ranks, over gloo, for saves in the background; None for a world of one."""
    watching: dist.ProcessGroup | None = None
    """All ranks, over gloo, to exchange flags such as signals during training: it never waits for a GPU's stream."""
    copying: dist.ProcessGroup | None = None
    """All ranks, over gloo, for copies of the state in memory; None without them."""
    teacher: TeacherGroups | None = None
    """None without a teacher, and on ranks of earlier pipeline stages."""

    @property
    def data_rank(self) -> int:
        """Index among the data-parallel ranks, without context ranks: it selects the rows that this rank reads."""
        return self.groups.dp.rank()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last layers of the model, and so the loss."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def sum_over_world(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all ranks, in place. Collective over the world."""
        if self.layout.world > 1:
            dist.all_reduce(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one rank. Collective over the world."""
        if self.layout.world == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is true on at least one rank. Collective over the world."""
        if self.layout.world == 1:
            return list(flags)
        values = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def begin_any_of(self, *flags: bool) -> Callable[[], list[bool]]:
        """`any_of` without waiting: starts the reduction; the returned function waits for it. Collective over the world."""
        if self.layout.world == 1:
            return lambda: list(flags)
        values = torch.tensor([float(flag) for flag in flags])
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.watching, async_op=True)

        def answer() -> list[bool]:
            work.wait()
            return [bool(value) for value in values.tolist()]

        return answer

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank; pickled. Collective over the world."""
        if self.layout.world == 1:
            return [value]
        values: list[Any] = [None] * self.layout.world
        dist.all_gather_object(values, value, group=self.watching)
        return values

    def begin_sum_over_rows(self, *counts: int) -> Callable[[], tuple[int, ...]]:
        """Sum what each data-parallel rank counts in its own rows, without waiting: the returned function waits, and may be
        called again. Ranks that share rows pass the same counts. Collective over the world."""
        if self.layout.world == 1:
            return lambda: counts
        total = torch.tensor(counts)
        work = dist.all_reduce(total, group=self.watching, async_op=True)

        def answer() -> tuple[int, ...]:
            work.wait()
            return tuple(count * self.layout.data // self.layout.world for count in total.tolist())

        return answer

    def barrier(self) -> None:
        """Wait for all ranks. Collective over the world."""
        if self.layout.world > 1:
            dist.barrier()


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun or Slurm's `srun` set them; (0, 1) for a plain process."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env.get("WORLD_SIZE", "1"))
    if "SLURM_PROCID" in env and "MASTER_ADDR" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    return 0, 1


def open_mesh(
    layout: Layout,
    device: torch.device,
    *,
    rank: int,
    seed: int,
    timeout_s: float,
    teacher_tensor: int | None = None,
    memory_copies: bool = False,
) -> Mesh:
    """Join the world and build the groups of `layout`. Collective over the world; undone by `close_mesh`.

    memory_copies: whether the run copies its state into memory (`Mesh.copying`).
    teacher_tensor: tensor degree of a teacher on the last pipeline stage; None: no teacher. Raises RecipeError if that
    degree does not fit the layout.
    """

    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        if "MASTER_ADDR" in os.environ and layout.world > 1:
            store = _loopback_store(rank, world=layout.world, timeout=timeout)
            dist.init_process_group(backend, rank=rank, world_size=layout.world, timeout=timeout, store=store)
        else:
            dist.init_process_group(backend, rank=0, world_size=1, timeout=timeout, store=dist.HashStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        create_gloo_process_groups=device.type == "cuda",
    )
    _time_out_after(timeout)
    unset_num_microbatches_calculator()
    seed_random_state(seed)
    saving = dist.new_group(backend="gloo", timeout=timeout) if layout.world > 1 else None
    watching = dist.new_group(backend="gloo", timeout=timeout) if layout.world > 1 else None
    copying = dist.new_group(backend="gloo", timeout=timeout) if layout.world > 1 and memory_copies else None
    teacher = None
    if teacher_tensor is not None:
        teacher = _teacher_groups(layout, rank, tensor=teacher_tensor, timeout=timeout)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Mesh(
        layout=layout,
        rank=rank,
        device=device,
        groups=groups,
        saving=saving,
        watching=watching,
        copying=copying,
        teacher=teacher,
    )


def _teacher_groups(layout: Layout, rank: int, *, tensor: int, timeout: timedelta) -> TeacherGroups | None:
    """Groups of the teacher on the last stage. Ranks of earlier stages create as many unused groups of one rank, because
    torch's group counter must be the same on all ranks."""
    placement = placement_of(layout, rank, tensor=tensor)
    members = [[rank]] * 5
    if placement is not None:
        first = layout.world - placement.ranks
        everyone = list(range(placement.ranks))
        parts = [[placement.index], placement.teacher_group, placement.replicas, everyone, placement.exchange_group]
        members = [[first + index for index in part] for part in parts]
    opened = [dist.new_group(ranks, timeout=timeout, use_local_synchronization=True) for ranks in members]
    return TeacherGroups(*opened) if placement is not None else None


def _loopback_store(rank: int, *, world: int, timeout: timedelta) -> dist.Store | None:
    """The rendezvous store if all ranks are on this machine: rank 0 listens on loopback only.

    torch's own store listens on every interface for any MASTER_ADDR, and anybody who can reach it can stop the run.
    None if ranks may be on other machines, or if torchrun hosts the store.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "0"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or address not in _LOOPBACK or not port:
        return None
    if rank != 0:
        return dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if address == "::1" else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError:
            # The store of a mesh that this process opened before still listens: torch finds it by its port.
            return dist.TCPStore(address, port, world, is_master=True, timeout=timeout, multi_tenant=True)
        listener.listen(socket.SOMAXCONN)
        descriptor = os.dup(listener.fileno())
        return dist.TCPStore(
            address, port, world, is_master=True, timeout=timeout, multi_tenant=True, master_listen_fd=descriptor
        )


def _time_out_after(timeout: timedelta) -> None:
    """Set the exact timeout on every group of this process: Megatron accepts whole minutes only."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.set_timeout(timeout, group)


def seed_random_state(seed: int) -> None:
    """Seed the generators of dropout as Megatron does: equal on data-parallel ranks, different on tensor and pipeline ranks.
    Needs initialized groups."""

    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def close_mesh() -> None:
    """Destroy all process groups. Safe to call after `open_mesh` failed."""

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()

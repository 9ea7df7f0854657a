"""A sampled step computed several times and compared bit for bit, before its update.

    own rows, on this rank      a replay, then the step itself
    the rows of the next data-parallel rank, read again by position, on this rank

The gradients of this rank's rows, before they are reduced, are compared by fingerprints, and the losses with them. All ranks
of a data-parallel group have the same weights, so a rank must reproduce its neighbour's gradients to the bit. Where that fails,
everything is repeated:

    transient     the rank's own results differ once, then agree
    persistent    they keep differing, or a majority of other ranks disagrees with this rank every time
    wrong input   the rows that a rank used are not those at their positions

A wrong number spreads to the tensor, pipeline, context and expert ranks that compute the same rows. Each pass therefore lists
the fingerprints of what its rank sent and received. Two passes of the rank at fault first differ in something that it sent or in
its own gradients; those of any other rank first differ in something that it received.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data.batch import Batch
from recipes.schema.integrity import IntegrityConfig
from recipes.schema.layout import Layout
from train.checkpoint import fingerprint
from train.checkpoint.random_state import random_state_kept
from train.engine import Engine, run_schedule
from train.integrity.collectives import CollectiveWatch, Trace
from train.integrity.findings import Finding, host_name, odd_ones
from train.model.experts import loads_of, set_loads
from train.native.gemm import multiply
from train.objective.step_counts import count_step

DETECTOR = "the replay of a step"
_ROUNDS = 3
"""Repetitions that tell a transient fault from a persistent one."""

Rows = Callable[[np.ndarray], Batch]
"""Training rows at positions, read again from the data."""


@dataclass(frozen=True)
class Pass:
    """What one computation of some rows gave on this rank."""

    digest: str
    """Of all gradients and losses."""
    parts: tuple[str, ...]
    """Of each parameter's gradient, in the order of the model; the last is that of the losses."""
    trace: tuple[tuple[bool, str], ...]
    """What the rank sent and received before (`train.integrity.collectives.Trace`)."""


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others about a sampled step."""

    place: tuple[int, int, int]
    """(tensor, pipeline, context) rank: ranks with equal places must agree about equal rows."""
    data_rank: int
    host: str
    own: tuple[Pass, ...]
    """The rank's own rows, the step itself last."""
    lent: tuple[tuple[int, Pass], ...]
    """(data rank whose rows they are, their pass) of rows of other ranks."""
    used_rows: str
    """Digest of the rows that this rank used."""
    read_rows: tuple[tuple[int, str], ...]
    """(data rank, digest) of rows as this rank reads them."""
    is_probe_right: bool


def is_sampled(config: IntegrityConfig, step: int, *, seed: int) -> bool:
    """Whether a step, counted from 1, is replayed: a function of seed and step, so that all ranks agree."""
    return random.Random(f"replay {seed} {step}").random() < config.replay_fraction


def replicas_have_all_experts(layout: Layout) -> bool:
    """Whether each data-parallel rank, with those it shares the model with, has every expert. Otherwise gradients of experts
    differ between data-parallel ranks with equal rows: they are of other experts, and sums over all of these ranks' rows."""
    return (layout.tensor * layout.context) % (layout.expert * layout.expert_tensor) == 0


class StepReplay:
    """Replays sampled steps of one engine."""

    def __init__(
        self, engine: Engine, *, collectives: CollectiveWatch, rows: Rows | None, compares_ranks: bool
    ) -> None:
        """rows: reads rows again; None: only own rows are replayed. compares_ranks: whether all ranks compute the same bits, and
        `replicas_have_all_experts`."""
        self._engine = engine
        self._collectives = collectives
        self._rows = rows
        self._compares_ranks = compares_ranks and rows is not None and engine.mesh.layout.data > 1
        self._probe = _probe()
        self.clean_step = 0

    def neighbours(self) -> tuple[int, ...]:
        """Distances to the data-parallel ranks whose rows this rank computes: two where there are three ranks, for a majority."""
        count = self._engine.mesh.layout.data
        return tuple(range(1, min(count, 3))) if self._compares_ranks else ()

    def before(self, microbatches: list[Any], *, step: int) -> "Sample":
        """Compute the replays. The step itself comes afterwards, inside `observed`. Collective over the world."""
        with random_state_kept(self._engine.mesh), _buffers_kept(self._engine):
            lent = tuple(
                (distance, self._compute(self._lent(microbatches, distance), step)) for distance in self.neighbours()
            )
            own = self._compute(microbatches, step)
        return Sample(step, microbatches, [own], lent)

    @contextmanager
    def observed(self, sample: "Sample") -> Iterator[None]:
        """The step itself, run inside this context, adds its gradients' fingerprints to the sample before they are reduced."""
        engine = self._engine
        config = engine.chunks[0].module.config
        finalize = config.finalize_model_grads_func

        def finish(*arguments: Any, **named: Any) -> None:
            sample.own.append(_pass_of(engine, sample.losses, trace))
            finalize(*arguments, **named)

        trace: Trace = []
        with (
            self._collectives.tracing(trace),
            _reduction_by(engine, finish),
            _losses_into(engine, sample.losses),
        ):
            yield

    def judge(self, sample: "Sample") -> list[Finding]:
        """Compare all ranks' results. -> what was found, the same on every rank. Collective over the world.

        After a finding the gradients are those of another computation: the step must be repeated or given up.
        """
        mesh = self._engine.mesh
        reports = mesh.gather_objects(self._report(sample))
        suspects = _suspects(reports)
        if not suspects:
            self.clean_step = sample.step
            return []
        with random_state_kept(mesh), _buffers_kept(self._engine):
            rounds = [
                replace(
                    sample,
                    own=[self._compute(sample.microbatches, sample.step) for _ in range(2)],
                    lent=tuple(
                        (d, self._compute(self._lent(sample.microbatches, d), sample.step)) for d in self.neighbours()
                    ),
                )
                for _ in range(_ROUNDS)
            ]
        again = [_suspects(mesh.gather_objects(self._report(one))) for one in rounds]
        return [
            Finding(
                detector=DETECTOR,
                kind=_kind(ranks, why, again),
                step=sample.step,
                ranks=ranks,
                hosts=tuple(reports[rank].host for rank in ranks),
                clean_step=self.clean_step,
                text=why,
            )
            for ranks, why in suspects.items()
        ]

    def _compute(self, microbatches: list[Any], step: int) -> Pass:
        """Forward and backward without reduction and without update."""
        engine = self._engine
        tokens = step - 1
        tokens *= len(microbatches) * engine.microbatch_rows * engine.mesh.layout.data * engine.row_tokens
        engine.precision.begin_step(step=step - 1, tokens=tokens)
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        if engine.prepare is not None:
            microbatches = engine.prepare(microbatches)
        microbatches, _ = count_step(engine.mesh, microbatches, engine.counter)
        losses: list[torch.Tensor] = []
        found: list[Pass] = []

        def finish(*_arguments: Any, **_named: Any) -> None:
            found.append(_pass_of(engine, losses, trace))

        trace: Trace = []
        with self._collectives.tracing(trace), _reduction_by(engine, finish), _losses_into(engine, losses):
            run_schedule(engine, microbatches, forward_step=engine.forward_step)
        return found[0]

    def _lent(self, microbatches: list[Any], distance: int) -> list[Any]:
        """The microbatches of another data-parallel rank, read by their positions."""
        assert self._rows is not None
        engine = self._engine
        shift = self._data_rank(distance) - engine.mesh.data_rank
        return [self._rows(batch.positions + shift * engine.microbatch_rows) for batch in microbatches]

    def _data_rank(self, distance: int) -> int:
        return (self._engine.mesh.data_rank + distance) % self._engine.mesh.layout.data

    def _report(self, sample: "Sample") -> _Report:
        groups = self._engine.mesh.groups
        used = ""
        read: tuple[tuple[int, str], ...] = ()
        if self._rows is not None:
            mine = [self._rows(batch.positions) for batch in sample.microbatches]
            used = _rows_digest(sample.microbatches)
            read = ((self._engine.mesh.data_rank, _rows_digest(mine)),)
        return _Report(
            place=(groups.tp.rank(), groups.pp.rank(), groups.cp.rank()),
            data_rank=self._engine.mesh.data_rank,
            host=host_name(),
            own=tuple(sample.own),
            lent=tuple((self._data_rank(distance), one) for distance, one in sample.lent),
            used_rows=used,
            read_rows=read,
            is_probe_right=_probe() == self._probe,
        )


@dataclass
class Sample:
    """The computations of one sampled step on this rank."""

    step: int
    microbatches: list[Any]
    own: list[Pass]
    """Of the rank's own rows: the replay, then the step itself."""
    lent: tuple[tuple[int, Pass], ...]
    """(distance to the rank, its rows computed here)."""

    def __post_init__(self) -> None:
        self.losses: list[torch.Tensor] = []


def _suspects(reports: list[_Report]) -> dict[tuple[int, ...], str]:
    """{ranks: why}, empty if everything agrees. Several ranks together: one of them."""
    found: dict[tuple[int, ...], str] = {}
    misled: set[int] = set()
    """Ranks whose results differ because of something that they received."""
    for rank, report in enumerate(reports):
        if any(owner == report.data_rank and digest != report.used_rows for owner, digest in report.read_rows):
            found[(rank,)] = "the rows it used are not those at their positions"
        elif any(_parted(report.own[0], other) == "here" for other in report.own[1:]):
            found[(rank,)] = "it computed its own rows twice with different results"
        elif any(_parted(report.own[0], other) for other in report.own[1:]):
            misled.add(rank)
    unsure: set[tuple[int, ...]] = set()
    for rank, report in enumerate(reports):
        if (rank,) in found:
            continue
        opinions = {rank: report.own[-1]}
        for lender, its in enumerate(reports):
            passes = [one for owner, one in its.lent if owner == report.data_rank]
            if its.place == report.place and passes:
                opinions[lender] = passes[0]
        ranks = sorted(opinions)
        if len({one.digest for one in opinions.values()}) == 1:
            continue
        odd = odd_ones([opinions[one].digest for one in ranks])
        if odd is None:
            here = any(_parted(report.own[-1], other) == "here" for other in opinions.values())
            if here:
                unsure.add(tuple(ranks))
            else:
                misled.update(ranks)
        for index in odd or ():
            right = opinions[next(one for place, one in enumerate(ranks) if place not in (odd or ()))]
            if _parted(right, opinions[ranks[index]]) == "here":
                found.setdefault((ranks[index],), "other ranks computed the same rows with another result than it")
            else:
                misled.add(ranks[index])
    for together in unsure:
        if any((rank,) in found for rank in together):
            continue
        wrong = tuple(rank for rank in together if not reports[rank].is_probe_right)
        found[wrong or together] = "two ranks computed the same rows with different results"
    if misled and not found:
        found[tuple(sorted(misled))] = (
            "what it received from another rank differed between two computations of the same rows"
        )
    return found


def _parted(a: Pass, b: Pass) -> str:
    """Where two passes of the same rows first differ: `here` in what their rank computed, `elsewhere` in what it received."""
    if a.digest == b.digest:
        return ""
    first = next((one for one, other in zip(a.trace, b.trace, strict=False) if one != other), None)
    return "elsewhere" if first is not None and first[0] else "here"


def _kind(ranks: tuple[int, ...], why: str, again: list[dict[tuple[int, ...], str]]) -> Any:
    if why.startswith("the rows"):
        return "wrong input"
    return "persistent" if any(set(ranks) & set(other) for found in again for other in found) else "transient"


def _pass_of(engine: Engine, losses: list[torch.Tensor], trace: Trace) -> Pass:
    parts = []
    for chunk in engine.chunks:
        for parameter in chunk.module.parameters():
            if parameter.requires_grad:
                flat = parameter.main_grad.reshape(-1)
                parts.append(
                    fingerprint.text(fingerprint.of_box(flat, whole=flat.shape, offset=(0,), shape=flat.shape))
                )
    exact = b"".join(loss.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for loss in losses)
    parts.append(hashlib.sha256(exact).hexdigest()[:32])
    return Pass(hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32], tuple(parts), tuple(trace))


@contextmanager
def _reduction_by(engine: Engine, finish: Callable[..., None]) -> Iterator[None]:
    """Let Megatron's schedules call `finish` at the end of the backward pass, and reduce nothing before it."""
    config = engine.chunks[0].module.config
    names = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
    before = {name: getattr(config, name) for name in names}
    overlaps = [chunk.ddp_config.overlap_grad_reduce for chunk in engine.chunks]
    config.finalize_model_grads_func, config.no_sync_func, config.grad_sync_func = finish, None, None
    for chunk in engine.chunks:
        chunk.ddp_config.overlap_grad_reduce = False  # read at every backward pass: its hooks would start the reduction
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
        for chunk, overlap in zip(engine.chunks, overlaps, strict=True):
            chunk.ddp_config.overlap_grad_reduce = overlap


@contextmanager
def _losses_into(engine: Engine, losses: list[torch.Tensor]) -> Iterator[None]:
    """Collect each microbatch's output of the model's last stage, from which its loss is made."""
    del losses[:]
    if not engine.mesh.is_last_stage:
        yield
        return
    handle = engine.chunks[-1].module.register_forward_hook(
        lambda _module, _inputs, output: losses.append(output.detach()) if isinstance(output, torch.Tensor) else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _buffers_kept(engine: Engine) -> Iterator[None]:
    """Restore the modules' buffers, such as amax histories, and the counts of experts at the end of the block."""
    buffers = [buffer for chunk in engine.chunks for buffer in chunk.module.buffers()]
    copies = [buffer.detach().clone() for buffer in buffers]
    loads = loads_of(engine.chunks)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)
        set_loads(engine.chunks, loads)


def _rows_digest(microbatches: list[Any]) -> str:
    digest = hashlib.sha256()
    for batch in microbatches:
        for name in ("tokens", "labels", "document_index", "learned"):
            values = getattr(batch, name)
            if values is not None:
                digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _probe() -> str:
    """Digest of a fixed product: a rank that computes it otherwise than at the start of the run is at fault."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(128, 128, generator=generator) for _ in range(2))
    values = torch.tanh(multiply(a, b)).contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]

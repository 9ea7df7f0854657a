"""Silent corruption on one rank of two or three: found by the intended detector, with the rank at fault and the kind of fault."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from corruption import ActivationFault, flip, state_kept
from expert_models import MIXTURE
from ranks import run_ranks
from tiny import engine_of, microbatches, recipe_with, rows_of

from recipes.schema.errors import CorruptionError
from recipes.schema.integrity import IntegrityConfig
from recipes.schema.run_folder import SUSPECTS
from train.engine import Engine
from train.integrity.findings import odd_ones
from train.integrity.replay import replicas_have_all_experts
from train.integrity.watch import Integrity
from train.model.experts import _layers
from train.record.stopwatch import Stopwatch
from train.step import StepResult, train_step

ON = IntegrityConfig(enabled=True, compare_every_steps=1, replay_fraction=1.0)
SMALL = {
    "model.pattern": "M*-", "model.hidden": 32, "model.ffn": 64, "model.heads": 2, "model.kv_heads": 2, "model.mamba_heads": 4,
    "model.mamba_head_dim": 8, "model.mamba_state": 8, "data.row_tokens": 16,
}  # fmt: skip


class Trial:
    """A watched engine on this rank."""

    def __init__(self, engine: Engine, recipe: Any, folder: Path, config: IntegrityConfig = ON) -> None:
        self.engine, self.recipe, self.folder, self.step = engine, recipe, folder, 0
        self.events: list[dict[str, Any]] = []
        telemetry: Any = SimpleNamespace(event=lambda kind, **fields: self.events.append({"kind": kind, **fields}))
        self.watch = Integrity(
            config, engine, telemetry=telemetry, folder=folder, seed=1, rows=self.rows,
            compares_ranks=replicas_have_all_experts(engine.mesh.layout),
        )  # fmt: skip

    def rows(self, positions: np.ndarray) -> Any:
        batch = rows_of(self.step, positions)
        size = self.recipe.data.row_tokens
        cut = {name: getattr(batch, name)[:, :size].contiguous() for name in ("tokens", "labels", "document_index")}
        return replace(batch, **cut)

    def take(self, change: Callable[[list[Any]], list[Any]] = lambda rows: rows) -> StepResult:
        """One step; `change` is done to the rows that the rank uses, right before them."""
        self.step += 1
        rows = change(microbatches(self.recipe, self.engine.mesh, 0, rows=lambda _step, at: self.rows(at)))
        return self.watch.take(
            self.step,
            rows,
            before_update=lambda: None,
            train=lambda before, after: train_step(
                self.engine,
                rows,
                step=self.step - 1,
                learning_rate=1e-3,
                watch=Stopwatch(),
                before_update=before,
                after_reduction=after,
            ),
        )

    def caught(self, plant: Callable[[list[Any]], list[Any]], *, on: int) -> list[tuple[str, tuple[int, ...]]]:
        """(kind, ranks) of the findings of a step with something planted on one rank."""
        count = len(self.events)
        try:
            self.take(plant if self.engine.mesh.rank == on else lambda rows: rows)
        except CorruptionError as error:
            assert self.folder.name in str(error)
        return [(e["fault"], tuple(e["ranks"])) for e in self.events[count:] if e["kind"] == "corruption"]


@contextmanager
def trial_of(rank: int, world: int, changes: dict[str, Any], folder: Path) -> Iterator[Trial]:
    recipe = recipe_with(**SMALL | {"run.global_rows": world, "run.microbatch_rows": 1} | changes)
    with engine_of(recipe, rank=rank, world=world) as engine:
        trial = Trial(engine, recipe, folder)
        trial.take()
        trial.take()
        assert not trial.events
        yield trial


def find_all(
    rank: int, world: int, changes: dict[str, Any], folder: Path, guilty: int, *, few: bool = False
) -> dict[str, Any]:
    """Every kind of fault on one rank; few: of weights and state, one each. -> findings by name."""
    found: dict[str, Any] = {}
    with trial_of(rank, world, changes, folder) as trial:
        engine = trial.engine
        weights = [p for chunk in engine.chunks for p in chunk.module.parameters()]
        layers = engine.chunks[0].module.decoder.layers
        layer = layers[len(layers) // 2]

        def planted(name: str, plant: Callable[[list[Any]], list[Any]]) -> None:
            with state_kept(engine):
                found[name] = trial.caught(plant, on=guilty)
            trial.watch.forget()
            trial.take()  # a clean step in between raises no alarm and is remembered

        def touch(tensor: torch.Tensor, element: int, bit: int) -> Callable[[list[Any]], list[Any]]:
            def touched(rows: list[Any]) -> list[Any]:
                flip(tensor, element=element, bit=bit)
                return rows

            return touched

        for part in (
            (0.5,) if few else (0.0, 0.5, 1.0)
        ):  # stages have different weights, but their ranks meet in every step
            weight = weights[int(part * (len(weights) - 1))]
            planted(f"weight {part}", touch(weight, 0, 0))
            planted(f"weight end {part}", touch(weight, weight.numel() - 1, 9))
        assert trial.watch._state is not None and trial.watch._replay is not None
        own = [one for one in trial.watch._state._own if one.tensor.numel()]  # another list on each rank
        for index in (2,) if few else range(4):
            one = own[index * len(own) // 4]
            planted(f"state {index}", touch(one.tensor, one.tensor.numel() - 1, 3))
        planted("rows", lambda rows: [replace(rows[0], tokens=(rows[0].tokens + 1) % 256), *rows[1:]])
        passes = trial.recipe.run.global_rows // engine.mesh.layout.data
        lent = len(trial.watch._replay.neighbours()) * passes
        for name, at, factor in (
            ("one flip in the step itself", (lent + passes,), None),
            ("one flip in its replay", (lent,), None),
            ("1 % once", (lent + passes,), 1.01),
            ("flips always", None, None),
            ("the same wrong number always", None, 1.01),
        ):
            fault = None
            if rank == guilty:
                fault = ActivationFault(layer, at=at, factor=factor)
            with state_kept(engine):
                found[name] = trial.caught(lambda rows: rows, on=guilty)
            if fault is not None:
                fault.remove()
            trial.watch.forget()
            trial.take()
    return found


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"precision.params": "bf16"}),
        (3, {"parallel.overlap_grad_reduce": True}),
    ],
)
def test_each_fault_is_found_with_its_kind_and_its_rank(world: int, changes: dict[str, Any], tmp_path: Path) -> None:
    results = run_ranks(world, find_all, world, changes, tmp_path, world - 1)
    assert all(found == results[0] for found in results), "all ranks conclude the same"
    guilty = world - 1
    expected = {
        "rows": ("wrong input", (guilty,)),
        "one flip in the step itself": ("transient", (guilty,)),
        "one flip in its replay": ("transient", (guilty,)),
        "1 % once": ("transient", (guilty,)),
        "flips always": ("persistent", (guilty,)),
        "the same wrong number always": ("persistent", (guilty,) if world > 2 else (0, 1)),
    }
    for name, found in results[0].items():
        assert set(found) == {expected.get(name, ("state", (guilty,)))}, f"{name}: {found}"
    lines = [json.loads(line) for line in (tmp_path / SUSPECTS).read_text().splitlines()]
    assert {rank for line in lines if line["kind"] == "state" for rank in line["ranks"]} == {guilty}
    assert all(line["hosts"] for line in lines)


@pytest.mark.parametrize(
    ("world", "changes", "guilty"),
    [
        (2, {"parallel.pipeline": 2, "model.pattern": "M*-M"}, 0),
        (4, {"parallel.pipeline": 2, "model.pattern": "M*-M"}, 1),
        (2, {"parallel.tensor": 2, "parallel.sequence": True}, 0),
        (2, MIXTURE | {"parallel.expert": 2}, 1),
    ],
)
def test_ranks_that_compute_rows_together_are_told_apart(
    world: int, changes: dict[str, Any], guilty: int, tmp_path: Path
) -> None:
    """A wrong number spreads to the other stages, tensor ranks and experts; only the rank that made it is named."""
    changes = {"run.global_rows": world} | changes
    results = run_ranks(world, partial(find_all, few=True), world, changes, tmp_path, guilty)
    assert all(found == results[0] for found in results), "all ranks conclude the same"
    expected = {
        "rows": {("wrong input", (guilty,))},
        "one flip in the step itself": {("transient", (guilty,))},
        "one flip in its replay": {("transient", (guilty,))},
        "1 % once": {("transient", (guilty,))},
        "flips always": {("persistent", (guilty,))},
        # nobody else computes these rows; of two replicas nobody knows which one is right
        "the same wrong number always": {("persistent", (0, 1))} if world == 4 else set(),
    }
    for name, found in results[0].items():
        assert set(found) == expected.get(name, {("state", (guilty,))}), f"{name}: {found}"


def split_experts(rank: int, folder: Path) -> list[dict[str, Any]]:
    """Events of two clean steps whose experts are split over the data-parallel ranks."""
    with trial_of(rank, 2, MIXTURE | {"parallel.expert": 2}, folder) as trial:
        return trial.events


def test_experts_split_over_data_parallel_ranks_are_no_false_alarm(tmp_path: Path) -> None:
    assert run_ranks(2, split_experts, tmp_path) == [[], []]


def loads_after(rank: int, folder: Path) -> list[tuple[int, list[int], float]]:
    """What the routers counted in three steps: plain, then replayed and one of them repeated."""
    found = []
    recipe = recipe_with(**SMALL | MIXTURE | {"run.global_rows": 1, "run.microbatch_rows": 1})
    with engine_of(recipe, rank=rank, world=1) as engine:
        for config in (IntegrityConfig(), ON):
            with state_kept(engine):
                trial = Trial(engine, recipe, folder, config)
                buffers = [(b, b.clone()) for chunk in engine.chunks for b in chunk.module.buffers()]
                fault = ActivationFault(engine.chunks[0].module.decoder.layers[0], at=(3,)) if config.enabled else None
                for _ in range(3):
                    trial.take()
                if fault is not None:
                    fault.remove()
                assert bool(trial.events) == config.enabled
                loads = [load for layer in _layers(engine.chunks) for load, _ in [layer.take_load()]]
                found += [(load.tokens, load.per_expert.tolist(), load.entropy) for load in loads]
                for buffer, copy in buffers:
                    buffer.copy_(copy)
    return found


def test_replayed_and_repeated_steps_count_the_load_of_experts_once(tmp_path: Path) -> None:
    (found,) = run_ranks(1, loads_after, tmp_path)
    assert found[: len(found) // 2] == found[len(found) // 2 :]


def test_odd_ones_needs_a_majority() -> None:
    assert odd_ones(["a", "a", "b"]) == [2] and odd_ones(["a", "b", "a", "a", "c"]) == [1, 4]
    assert odd_ones(["a", "b"]) is None and odd_ones(["a", "b", "c"]) is None and odd_ones(["a", "a"]) is None
    assert odd_ones(["a", "a", "b", "b"]) is None


def checked_and_plain(rank: int, world: int, folder: Path) -> list[bool]:
    """Whether three watched steps, one of them with a flip that is repeated, end with the bits of plain steps."""
    weights = []
    overlap = {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True}
    recipe = recipe_with(**SMALL | overlap | {"run.global_rows": world, "run.microbatch_rows": 1})
    with engine_of(recipe, rank=rank, world=world) as engine:
        for config in (ON, IntegrityConfig()):
            with state_kept(engine):
                trial = Trial(engine, recipe, folder, config)
                fault = None
                for step in range(3):
                    if step == 1 and rank == 0 and config.enabled:
                        fault = ActivationFault(engine.chunks[0].module.decoder.layers[0], at=(world,))
                    trial.take()
                if fault is not None:
                    fault.remove()
                assert bool(trial.events) == config.enabled
                for chunk in engine.chunks:
                    chunk.start_param_sync(force_sync=True)
                weights.append([p.detach().clone() for chunk in engine.chunks for p in chunk.module.parameters()])
    return [torch.equal(a, b) for a, b in zip(*weights, strict=True)]


def test_checks_and_a_repeated_step_leave_the_bits_as_they_were(tmp_path: Path) -> None:
    assert all(all(equal) for equal in run_ranks(2, checked_and_plain, 2, tmp_path))

"""Products and collectives checked by sums: the bound, no false alarms, and every planted fault found with its place and rank."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corruption import FaultyProducts, FaultyTransit, flip, state_kept
from expert_models import MIXTURE
from ranks import run_ranks
from tiny import engine_of, recipe_with

from recipes.schema.integrity import IntegrityConfig
from tests.train.integrity.test_integrity import SMALL, Trial
from train.native.gemm import multiply
from train.native.product_check import ProductCheck, compare

SUMS = IntegrityConfig(
    enabled=True, compare_every_steps=0, replay_fraction=0.0, collectives=True,
    products=("attention", "mamba", "mlp", "experts", "output"),
)  # fmt: skip


def operands(kind: str, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    m, k, n = shape
    generator = torch.Generator().manual_seed(m * k * n)
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    match kind:
        case "positive":  # partial sums grow with k, not with its root
            return a.abs(), b.abs()
        case "equal columns":  # the rounding errors of a row are equal, too
            return a, b[:, :1].expand(k, n)
        case "wide range":
            return a * torch.exp(5 * torch.randn(m, k, generator=generator)), b
        case "FP8 values":
            return a.to(torch.float8_e4m3fn).float(), b.to(torch.float8_e4m3fn).float()
        case "tiny":
            return a * 1e-25, b * 1e-15
        case "cancelling":  # the first half of each sum is undone by the second
            return torch.cat([a, a], 1), torch.cat([b, -b])
    return a, b


@pytest.mark.parametrize(
    "kind", ["normal", "positive", "equal columns", "wide range", "FP8 values", "tiny", "cancelling"]
)
@pytest.mark.parametrize("shape", [(7, 1, 3), (33, 300, 70), (5, 4096, 9)])
def test_rounding_is_no_alarm_and_an_element_that_is_off_is_named(kind: str, shape: tuple[int, int, int]) -> None:
    a, b = operands(kind, shape)
    c = multiply(a, b, factor=0.37)
    assert compare(a, b, c, factor=0.37) is None
    wrong = c.clone()
    step = 1e-3 * float(a[2].double().norm() * b.double().norm()) + 1e-30
    wrong[2, 1] += step
    found = compare(a, b, wrong, factor=0.37)
    assert found is not None and found[:2] == (2, 1) and found[4] == 1
    assert math.isclose(found[2], step, rel_tol=0.05)


def test_operands_that_are_not_finite_are_left_to_other_checks_and_a_result_that_is_not_is_a_fault() -> None:
    a, b = operands("normal", (4, 8, 5))
    spoiled = a.clone()
    spoiled[1, 2] = math.inf
    assert compare(spoiled, b, multiply(spoiled, b)) is None
    assert compare(a * 1e30, b * 1e30, multiply(a * 1e30, b * 1e30)) is None
    assert compare(a[:0], b, multiply(a[:0], b)) is None
    for value in (math.inf, math.nan):
        c = multiply(a, b)
        c[3, 4] = value
        found = compare(a, b, c)
        assert found is not None and found[:2] == (3, 4)


def test_a_fault_names_product_layer_row_and_column_once() -> None:
    check = ProductCheck("layer 3 mixer.in_proj")
    a, b = operands("normal", (4, 8, 5))
    faulty = FaultyProducts()
    faulty.target, faulty.element, faulty.bit = 1, 7, 29
    with faulty.installed():
        check.multiply("forward", a, b)
        check.multiply("data_grad", a, b)
    (fault,) = check.take()
    assert fault.describe().startswith("data_grad product of layer 3 mixer.in_proj: row 1, column 2 off by ")
    assert check.take() == []


def plant_everywhere(rank: int, world: int, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A flipped exponent bit on the last rank in products and in every kind of collective. -> findings by place."""
    guilty, found = world - 1, {}
    changes = SMALL | {"run.global_rows": 2, "run.microbatch_rows": 1, "run.integrity": SUMS} | changes
    recipe = recipe_with(**changes)
    with engine_of(recipe, rank=rank, world=world) as engine:
        trial = Trial(engine, recipe, folder, recipe.run.integrity)
        products, transit = FaultyProducts(), FaultyTransit(engine.mesh)

        def caught(
            faulty: FaultyProducts | FaultyTransit, target: int | None
        ) -> list[tuple[str, tuple[int, ...], str]]:
            count, faulty.target = len(trial.events), target if rank == guilty else None
            faulty.calls = 0 if isinstance(faulty, FaultyProducts) else []
            trial.caught(lambda rows: rows, on=guilty)
            faulty.target = None
            return [
                (e["fault"], tuple(e["ranks"]), e["detector"])
                for e in trial.events[count:]
                if e["kind"] == "corruption"
            ]

        with products.installed(), transit.installed():
            for _ in range(2):
                assert caught(products, None) == [], trial.events
            transit.calls = []
            trial.take()
            places = dict.fromkeys(transit.calls)
            names = engine.mesh.gather_objects(list(places))[guilty]
            order = engine.mesh.gather_objects(transit.calls)[guilty]
            for name in names if recipe.run.integrity.collectives else ():
                with state_kept(engine):
                    transit.only = name
                    found[name] = caught(transit, order.index(name))
            products.calls = 0
            trial.take()
            count = engine.mesh.gather_objects(products.calls)[guilty]
            for part in (0.1, 0.5, 0.9):
                with state_kept(engine):
                    found[f"product {part}"] = caught(products, int(part * count))
            assert caught(products, None) == []
    return found


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True, "precision.params": "bf16"}),
        (2, {"parallel.tensor": 2, "parallel.sequence": True, "precision.scaling": "current"}),
        (4, {"parallel.pipeline": 2, "model.pattern": "M*-M"}),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "model.pattern": "M*-MM*-M"}),
        (2, MIXTURE | {"parallel.expert": 2}),
    ],
)
def test_faults_in_products_and_transit_are_found_with_their_rank(
    world: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    results = run_ranks(world, plant_everywhere, world, changes, tmp_path)
    assert all(found == results[0] for found in results), "all ranks conclude the same"
    assert ("message" in results[0]) == ("parallel.pipeline" in changes)
    assert ("all_to_all_single" in results[0]) == ("parallel.expert" in changes)
    for name, found in results[0].items():
        assert found and all(world - 1 in ranks for _, ranks, _ in found), f"{name}: {found}"


def in_one_watch(rank: int, folder: Path) -> list[list[tuple[str, tuple[int, ...]]]]:
    """All checks at every step, and after each fault a step without one. -> findings by step."""
    config = replace(SUMS, compare_every_steps=1, replay_fraction=1.0)
    found = []
    recipe = recipe_with(**SMALL | MIXTURE | {"run.global_rows": 2, "run.microbatch_rows": 1, "run.integrity": config})
    with engine_of(recipe, rank=rank, world=2) as engine:
        trial = Trial(engine, recipe, folder, config)
        products, transit = FaultyProducts(), FaultyTransit(engine.mesh)
        weight = next(parameter for chunk in engine.chunks for parameter in chunk.module.parameters())

        def flipped(rows: list[Any]) -> list[Any]:
            flip(weight, element=5, bit=9)
            return rows

        with products.installed(), transit.installed():
            trial.take()
            products.calls, transit.calls = 0, []
            trial.take()
            middle = (products.calls // 2, len(transit.calls) // 2)
            for place in ("weight", "product", "weight", "collective", "weight"):
                with state_kept(engine):
                    if rank == 1:
                        products.calls, transit.calls = 0, []
                        products.target = middle[0] if place == "product" else None
                        transit.target = middle[1] if place == "collective" else None
                    found.append(trial.caught(flipped if place == "weight" else lambda rows: rows, on=1))
                trial.watch.forget()
                found.append(trial.caught(lambda rows: rows, on=1))
    return found


def test_all_checks_in_one_watch_conclude_the_same_on_all_ranks_and_go_on_after_a_fault(tmp_path: Path) -> None:
    first, second = run_ranks(2, in_one_watch, tmp_path)
    assert first == second, "ranks that disagree about a finding would wait for each other forever"
    assert all(findings == [] for findings in first[1::2]), first
    assert [bool(findings) for findings in first[::2]] == [True] * 5, first
    assert all(ranks == (1,) for findings in first[::2] for _, ranks in findings), first

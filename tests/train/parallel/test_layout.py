"""Layouts: every rule refuses with value, place and remedy; ranks are numbered as Megatron-Core numbers them."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from recipes.schema.errors import RecipeError
from recipes.schema.layout import Coordinates, Layout, lay_out, rank_coordinates
from recipes.schema.model import ModelConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.run import RunConfig

MODEL = ModelConfig(
    pattern="M-M*-M-M*-",
    hidden=256,
    vocab=4096,
    ffn=1024,
    heads=8,
    kv_heads=4,
    head_dim=32,
    mamba_heads=16,
    mamba_head_dim=32,
    mamba_groups=4,
)
RUN = RunConfig(name="test", steps=10, global_rows=16, microbatch_rows=2)


def layout_of(
    world: int, *, model: ModelConfig = MODEL, run: RunConfig = RUN, row_tokens: int = 256, **parallel: Any
) -> Layout:
    return lay_out(
        model=model, parallel=replace(ParallelConfig(), **parallel), run=run, row_tokens=row_tokens, world=world
    )


def test_degrees_and_accumulation() -> None:
    layout = layout_of(8, tensor=2, pipeline=2)
    assert layout == Layout(world=8, tensor=2, pipeline=2, virtual=1, context=1, data=2, microbatches_per_step=4)
    assert layout.describe() == "TP2 PP2 DP2"
    assert layout_of(8, pipeline=2, context=2, virtual_pipeline=2).describe() == "TP1 PP2 VP2 CP2 DP2"


# Each case: the world, the layout, and what the message must contain: the value, the place, the remedy.
REFUSED: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "world": (6, {"tensor": 4}, ["parallel.tensor=4", "does not divide the 6 processes", "--nproc-per-node 4"]),
    "heads": (
        16,
        {"tensor": 16, "model": replace(MODEL, kv_heads=8)},
        ["parallel.tensor=16", "model.heads=8, model.kv_heads=8", "model.mamba_groups=4", "Use 1, 2 or 4"],
    ),
    "kv_heads": (8, {"tensor": 8}, ["parallel.tensor=8", "model.kv_heads=4, model.mamba_groups=4.", "Use 1, 2 or 4"]),
    "mamba_heads": (
        4,
        {"tensor": 4, "model": replace(MODEL, mamba_heads=6, mamba_groups=2)},
        ["parallel.tensor=4 does not divide", "model.mamba_heads=6, model.mamba_groups=2", "Use 1 or 2"],
    ),
    "mamba_groups": (
        4,
        {"tensor": 4, "model": replace(MODEL, mamba_groups=2)},
        ["model.mamba_groups=2", "Use 1 or 2"],
    ),
    "ffn": (4, {"tensor": 4, "model": replace(MODEL, ffn=1022)}, ["model.ffn=1022", "Use 1 or 2"]),
    "vocab": (4, {"tensor": 4, "model": replace(MODEL, vocab=4095)}, ["model.vocab=4095", "Use 1 ("]),
    "groups of heads": (1, {"model": replace(MODEL, kv_heads=3)}, ["model.kv_heads=3", "Use 1, 2, 4 or 8"]),
    "groups of mamba heads": (
        1,
        {"model": replace(MODEL, mamba_groups=3)},
        ["model.mamba_groups=3", "Use 1, 2, 4, 8 or 16"],
    ),
    "odd rope": (
        1,
        {"model": replace(MODEL, head_dim=33, position="rope")},
        ["model.head_dim=33", "model.position=rope", "Use 34"],
    ),
    "sequence alone": (1, {"sequence": True}, ["parallel.sequence=true", "parallel.tensor > 1"]),
    "row over tensor ranks": (
        2,
        {"tensor": 2, "sequence": True, "row_tokens": 255},
        ["data.row_tokens=255", "data.row_tokens=254 or 256"],
    ),
    "row over context ranks": (
        2,
        {"context": 2, "row_tokens": 254},
        ["parallel.context=2", "4 chunks", "data.row_tokens=254", "data.row_tokens=252 or 256"],
    ),
    "row over both": (
        8,
        {"context": 2, "tensor": 4, "sequence": True, "row_tokens": 252},
        ["data.row_tokens=252", "tensor=4 x context=2", "data.row_tokens=248 or 256"],
    ),
    "mamba heads over context ranks": (
        8,
        {"context": 8, "tensor": 1, "model": replace(MODEL, mamba_heads=4)},
        ["parallel.context=8", "4 Mamba heads of a tensor rank", "Use 1, 2 or 4"],
    ),
    "mamba groups over context ranks": (
        6,
        {"context": 6, "model": replace(MODEL, mamba_heads=24), "row_tokens": 240, "run": replace(RUN, global_rows=12)},
        ["parallel.context=6", "4 Mamba groups", "Use 1, 2, 4, 8, 12 or 24"],
    ),
    "virtual pipeline alone": (1, {"virtual_pipeline": 2}, ["parallel.virtual_pipeline=2", "pipeline > 1"]),
    "virtual pipeline turns": (
        2,
        {"pipeline": 2, "virtual_pipeline": 2, "run": replace(RUN, global_rows=6)},
        ["parallel.virtual_pipeline=2", "(3)", "parallel.pipeline=2", "run.global_rows=4 or 8"],
    ),
    "more stages than layers": (
        12,
        {"pipeline": 12, "model": replace(MODEL, pattern="M-*-")},
        ["12 stages", "M-*-", "at most 4"],
    ),
    "cuts by hand": (
        2,
        {"pipeline": 2, "model": replace(MODEL, pattern="M-|M*-|M-")},
        ["M-|M*-|M-", "3 stages", "Use 1 `|`"],
    ),
    "unknown layer": (1, {"model": replace(MODEL, pattern="MA")}, ["model.pattern=MA", "'A'"]),
    "rows of a step": (
        2,
        {"run": replace(RUN, global_rows=18, microbatch_rows=4)},
        [
            "run.global_rows=18",
            "run.microbatch_rows=4",
            "2 data-parallel ranks",
            "run.global_rows=16 or 24",
            "run.microbatch_rows=3",
        ],
    ),
    "fewer rows than ranks": (
        4,
        {"run": replace(RUN, global_rows=2, microbatch_rows=1)},
        ["run.global_rows=2", "4 data-parallel ranks", "run.global_rows=4."],
    ),
    "gather without reduce": (
        1,
        {"overlap_param_gather": True},
        ["parallel.overlap_param_gather=true", "overlap_grad_reduce=true"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_value_place_and_remedy(name: str) -> None:
    world, layout, words = REFUSED[name]
    with pytest.raises(RecipeError) as error:
        layout_of(world, **layout)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value).splitlines()) == 1, str(error.value)


@pytest.mark.parametrize(
    "name", ["groups of heads", "mamba heads over context ranks", "rows of a step", "row over both"]
)
def test_the_remedy_is_accepted(name: str) -> None:
    """Every number that a message offers gives a valid layout."""
    world, layout, _ = REFUSED[name]
    with pytest.raises(RecipeError) as error:
        layout_of(world, **layout)
    remedy = str(error.value).split(" Use ")[1]
    for number in map(int, re.findall(r"\d+", remedy.split(", or run.micro")[0])):
        match name:
            case "groups of heads":
                layout_of(world, model=replace(MODEL, kv_heads=number))
            case "mamba heads over context ranks":
                layout_of(number, **layout | {"context": number})
            case "rows of a step":
                layout_of(world, run=replace(layout["run"], global_rows=number))
            case "row over both":
                layout_of(world, **layout | {"row_tokens": number})


def test_all_problems_in_one_error() -> None:
    model = replace(MODEL, kv_heads=3, mamba_groups=5)
    with pytest.raises(RecipeError) as error:
        layout_of(4, model=model, tensor=2, sequence=True, row_tokens=255, run=replace(RUN, global_rows=7))
    lines = str(error.value).splitlines()
    for word in ("model.kv_heads=3 does", "model.mamba_groups=5 does", "row_tokens=255", "global_rows=7"):
        assert sum(word in line for line in lines) == 1, str(error.value)


def test_layers_a_model_lacks_are_not_checked() -> None:
    model = replace(MODEL, pattern="*-", mamba_heads=3, mamba_groups=2)
    assert layout_of(4, model=model, tensor=4).data == 1
    assert layout_of(2, model=replace(MODEL, pattern="M", heads=3, kv_heads=2, ffn=7), tensor=2).data == 1


def test_ragged_mlp_of_the_9b_divides_by_eight() -> None:
    model = replace(
        MODEL, pattern="M-*-", hidden=4480, ffn=15680, heads=40, kv_heads=8, mamba_heads=128, mamba_groups=8
    )
    assert layout_of(8, model=model, tensor=8, sequence=True).tensor == 8


def megatron_coordinates(layout: Layout) -> list[Coordinates]:
    """Every rank's coordinates, from Megatron-Core's groups (its default order)."""
    ranks = RankGenerator(
        tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipeline, cp=layout.context, order="tp-cp-ep-dp-pp"
    )
    places: dict[str, dict[int, int]] = {}
    for axis in ("tp", "cp", "dp", "pp"):
        places[axis] = {rank: index for group in ranks.get_ranks(axis) for index, rank in enumerate(group)}
    return [
        Coordinates(
            tensor=places["tp"][rank],
            context=places["cp"][rank],
            data=places["dp"][rank],
            pipeline=places["pp"][rank],
        )
        for rank in range(layout.world)
    ]


degrees = st.sampled_from([1, 2, 3, 4, 8])


@given(tensor=degrees, pipeline=degrees, context=degrees, data=degrees)
def test_ranks_are_megatrons(tensor: int, pipeline: int, context: int, data: int) -> None:
    world = tensor * pipeline * context * data
    layout = Layout(
        world=world,
        tensor=tensor,
        pipeline=pipeline,
        virtual=1,
        context=context,
        data=data,
        microbatches_per_step=1,
    )
    assert [rank_coordinates(layout, rank) for rank in range(world)] == megatron_coordinates(layout)


@given(
    world=st.integers(1, 64),
    tensor=degrees,
    pipeline=degrees,
    virtual=st.sampled_from([1, 1, 2, 3]),
    context=degrees,
    sequence=st.booleans(),
    rows=st.integers(1, 64),
    microbatch_rows=st.integers(1, 4),
    row_tokens=st.sampled_from([64, 96, 128, 250]),
)
@settings(max_examples=300)
def test_accepted_layouts_are_consistent(
    world: int,
    tensor: int,
    pipeline: int,
    virtual: int,
    context: int,
    sequence: bool,
    rows: int,
    microbatch_rows: int,
    row_tokens: int,
) -> None:
    run = replace(RUN, global_rows=rows, microbatch_rows=microbatch_rows)
    try:
        layout = layout_of(
            world,
            run=run,
            row_tokens=row_tokens,
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            context=context,
            sequence=sequence,
        )
    except RecipeError as error:
        assert str(error).strip()
        return
    coordinates = {rank_coordinates(layout, rank) for rank in range(world)}
    assert len(coordinates) == world == tensor * pipeline * context * layout.data
    assert layout.microbatches_per_step * layout.data * microbatch_rows == rows
    # What Megatron-Core 0.19 asserts in MambaContextParallel and its interleaved schedule.
    heads, groups = MODEL.mamba_heads // tensor, MODEL.mamba_groups // tensor
    assert heads % context == 0 and (context % groups == 0 if groups < context else groups % context == 0)
    assert MODEL.heads % tensor == MODEL.kv_heads % tensor == MODEL.ffn % tensor == MODEL.vocab % tensor == 0
    assert virtual == 1 or (pipeline > 1 and layout.microbatches_per_step % pipeline == 0)
    assert pipeline * virtual <= len(MODEL.pattern)
    if context > 1:
        assert row_tokens % (2 * context) == 0
    if sequence:
        assert tensor > 1 and (row_tokens // context) % tensor == 0

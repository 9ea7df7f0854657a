"""`stratum plan` and `plan --search`, as a user runs them: no torch, fast, mistakes with value, place, remedy."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from shards import write_folder

from launch.compose import compose
from launch.plan.command import as_json, main
from launch.plan.cost.device import device_named, devices, find_device
from launch.plan.planner import make_plan
from launch.plan.search import limiting_field, search
from recipes.schema.compress import CompressConfig
from recipes.schema.recipe import Recipe
from recipes.schema.units import GIB
from tests.tiny import recipe_with

ROOT = Path(__file__).resolve().parents[3]
NANO_9B = (
    "-cn", "smoke", "model=nemotron_nano_9b_v2", "precision=fp8_blockwise", "precision.backend=te", "data.row_tokens=8192",
    "run.global_rows=768", "run.microbatch_rows=1", "run.name=not_there", "parallel.sequence=true",
)  # fmt: skip


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, JSON object, errors) of one command."""
    status = main([*words, "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else {}, captured.err


def test_a_plan_needs_no_torch_and_is_fast() -> None:
    program = (
        "import sys; from train.stratum import main; status = main(['plan', '-cn', 'nemotron_nano_12b_v2', '--json']);"
        "assert not {'torch', 'megatron', 'matplotlib'} & set(sys.modules), 'heavy'; sys.exit(status)"
    )
    seconds: list[float] = []
    while not seconds or (
        seconds[-1] >= 2 and len(seconds) < 3
    ):  # other processes on the same core slow one run, not all
        before = os.times()
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 2, f"CPU seconds of runs: {seconds}"
    found = json.loads(result.stdout)
    assert found["parameters"] == 12_310_001_152  # the published model, to the unit
    assert {"memory_gib_per_rank", "step_time_s", "tokens_per_s_per_gpu", "mfu"} <= found.keys()
    assert found["gpus"] == 736 and 20 < found["memory_gib_per_rank"] < 79 and 0.2 < found["mfu"] < 0.7
    assert found["tokens_per_step"] == 6_029_312  # arXiv 2508.14444


def test_a_plan_has_the_memory_of_copies() -> None:
    recipe = recipe_with(**{"run.memory_copies.every_steps": 1, "run.global_rows": 16})
    one, two = (make_plan(recipe, world=world, device=device_named("h100")) for world in (8, 16))
    for found, copies, ranks in ((one, 2, 8), (two, 4, 16)):
        assert found.copies is not None
        exact = 12 * found.parameters / ranks  # fp32 weights and two moments, split over the data-parallel ranks
        assert exact <= found.copies.rank_bytes < 1.02 * exact, "buckets are padded"
        assert found.copies.node_bytes == copies * 8 * found.copies.rank_bytes, (
            "a second node keeps copies of this one's ranks"
        )
    assert as_json(two, ranks=False)["memory_copies"]["node_bytes"] == two.copies.node_bytes
    assert make_plan(recipe_with(), world=1, device=device_named("h100")).copies is None


@pytest.mark.parametrize("tensor", [4, 8])
def test_the_9b_mlp_takes_four_tensor_ranks_in_fp8_and_not_eight(
    tensor: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """15,680 / 8 = 1,960 is not a multiple of 16 (Transformer Engine's FP8 linear layers); 15,680 / 4 = 3,920 is."""
    status, found, _ = plan(capsys, *NANO_9B, f"parallel.tensor={tensor}", "--gpus", "64")
    refused = [problem for problem in found["problems"] if "1,960" in problem and "mlp.linear_fc2" in problem]
    assert bool(refused) == (tensor == 8)
    assert status == (1 if tensor == 8 else 0)
    if refused:
        assert "multiple of 16" in refused[0] and "lower parallel.tensor" in refused[0]


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        (["parallel.tensor=3"], 2, ["parallel.tensor=3", "model.vocab=4096", "Use 1 or 2"]),
        (["parallel.pipeline=2", "run.global_rows=7", "--gpus", "4"], 2, ["run.global_rows=7", "run.microbatch_rows"]),
        (["model.hiden=3"], 2, ["model.hiden", "model.hidden"]),
        (["precision=mxfp8"], 1, ["precision.scaling=mxfp8", "Blackwell", "blockwise"]),
        (["precision=fp8_current", "--device", "a100"], 1, ["a100_80gb", "no FP8", "scaling=none"]),
        (["--device", "abacus"], 2, ["--device abacus", "h100"]),
        (["objective.kind=distill"], 1, ["objective.teacher"]),
        (["model=nemotron_h_56b", "precision=bf16"], 1, ["memory:", "GiB", "h100", "parallel.tensor=2"]),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    words: list[str], status: int, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    got, found, errors = plan(capsys, "-cn", "smoke", "run.name=not_there", *words)
    text = errors + "\n".join(found.get("problems", []))
    assert got == status, text
    for part in parts:
        assert part in text


def test_a_source_that_runs_out_is_found_where_the_data_is_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 and 60 rows of 32 tokens, 8 in each step, shares 0.6 and 0.4: after 150 rows 60 of `python` are read, in step 19."""
    documents = {"shakespeare": 100, "python": 60}
    write_folder(tmp_path, {n: [[np.append(np.ones(31), 0)] * rows] for n, rows in documents.items()})
    words = [
        "-cn", "smoke", "run.name=not_there", f"data.folder={tmp_path}", "data.row_tokens=32", "schedule.warmup=1",
        "schedule.decay=1", "+data.sources.python.max_epochs=1", "+data.sources.shakespeare.max_epochs=2",
    ]  # fmt: skip
    status, found, _ = plan(capsys, *words, "run.steps=18")
    assert status == 0 and not any("runs out" in one for one in found["problems"])
    status, found, _ = plan(capsys, *words, "run.steps=20")
    assert status == 1
    assert any("source 'python' runs out at step 19 (row 15" in one for one in found["problems"])
    assert any("data.on_exhausted=continue" in one for one in found["problems"])
    status, found, _ = plan(capsys, *words, "run.steps=20", "data.on_exhausted=continue")
    assert status == 0
    assert any("'python' has been read max_epochs=1 times at step 19" in one for one in found["warnings"])
    status, found, _ = plan(capsys, *words, "run.steps=33", "data.on_exhausted=continue")
    assert status == 1 and any("every source that is drawn at row 260" in one for one in found["problems"])
    status, found, _ = plan(capsys, *words, "+data.sources.more.path=nowhere")
    assert status == 1 and any("has no source more (it has shakespeare, python)" in one for one in found["problems"])


def test_a_teacher_takes_its_place_and_time_on_the_last_stage(tmp_path: Path) -> None:
    """The published 12B in bf16, whole on one rank: 2 bytes per parameter, 2 more for A_log, D and dt_bias in fp32."""
    model = yaml.safe_load((ROOT / "recipes/model/nemotron_nano_12b_v2.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": model}))
    words = {
        "precision.params": "bf16", "model.vocab": model["vocab"], "objective.kind": "distill", "parallel.pipeline": 2,
        "objective.teacher": str(tmp_path), "data.row_tokens": 8192,
    }  # fmt: skip
    recipe = recipe_with(**words)
    found, alone = (
        make_plan(one, world=8, device=device_named("h200"))
        for one in (recipe, recipe_with(**words | {"objective.kind": "next_token"}))
    )
    fp32 = 3 * 128 * model["pattern"].count("M")
    teacher = [memory.teacher for memory in found.memory]
    assert teacher[0] == 0 and 0 < teacher[1] - 2 * (12_310_001_152 + fp32) < 4 * GIB
    without_teacher = [replace(memory, teacher=0.0) for memory in (found.memory[1], alone.memory[1])]
    with_head, without = (replace(memory, activations=0.0, workspace=0.0) for memory in without_teacher)
    assert with_head == without, "weights, gradients, masters, moments and buffers are the student's own"
    assert without_teacher[0].total < without_teacher[1].total, "a distilled head has the logits of a few tokens only"
    assert found.time.parts["teacher"] > 0 == alone.time.parts["teacher"] and not found.warnings[-1].startswith(
        "objective"
    )


def test_a_teacher_of_the_students_shape_costs_about_a_third_of_its_step() -> None:
    """Backward is twice forward, plus accumulated gradients and recomputed attention scores."""
    recipe = compose(["-cn", "nemotron_nano_12b_v2"], program="plan")
    assert isinstance(recipe, Recipe)
    objective = replace(recipe.objective, kind="distill", teacher="runs/nemotron_nano_12b_v2")
    recipe = replace(
        recipe, objective=objective, precision=replace(recipe.precision, scaling="none", fp8_weights=False)
    )
    found = make_plan(recipe, world=736, device=device_named("h100"))
    microbatch = found.time.stage_seconds[-1] * found.layout.microbatches_per_step
    teacher = found.time.parts["teacher"]
    assert 0.27 < teacher / (microbatch - teacher) < 0.36
    assert "planned as model=nemotron_nano_12b_v2" in found.warnings[-1]


def test_a_teacher_with_another_vocabulary_or_without_a_folder_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    status, found, _ = plan(capsys, "-cn", "tiny_distill", "objective.teacher=runs/gemma2_9b", "--gpus", "1")
    assert status == 1 and any("256,000" in problem and "2,048" in problem for problem in found["problems"])
    _, found, _ = plan(capsys, "-cn", "tiny_distill", "objective.teacher=runs/nobody", "--gpus", "1")
    assert any("runs/nobody is not on this disk" in warning for warning in found["warnings"])


def test_all_mistakes_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A layout that breaks two rules and a precision the GPU lacks: three lines at once."""
    _, _, errors = plan(capsys, "-cn", "smoke", "parallel.tensor=3", "parallel.virtual_pipeline=2", "precision=mxfp8")
    assert "parallel.tensor=3" in errors and "virtual_pipeline=2" in errors and "mxfp8" in errors


def test_a_plan_adds_up() -> None:
    recipe = recipe_with(**{"parallel.pipeline": 2, "parallel.tensor": 2, "precision.params": "bf16"})
    found = make_plan(recipe, world=8, device=device_named("h100"))
    assert sum(found.time.parts.values()) == pytest.approx(found.time.seconds)
    data = as_json(found, ranks=True)
    assert len(data["ranks"]) == 8 and data["ranks"][5] == {"tensor": 1, "context": 0, "data": 0, "pipeline": 1}
    assert data["memory_gib_per_rank"] == max(sum(s["memory_bytes"].values()) for s in data["stages"]) / GIB
    assert data["tokens_per_s_per_gpu"] * 8 * data["step_time_s"] == pytest.approx(data["tokens_per_step"])
    # Without recomputation the work equals the FLOP convention: 3 forward passes (recipes.schema.pattern).
    counted = sum(data["step_flops_per_gpu"].values()) * 8
    assert counted == pytest.approx(data["flops_per_token"]["total"] * data["tokens_per_step"], rel=1e-6)


def test_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    words = ["-cn", "smoke", "run.name=not_there", "parallel.pipeline=2", "run.microbatch_rows=1", "--gpus", "2"]
    assert main([*words, "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    for part in (
        "Ranks",
        "Memory of the fullest rank",
        "pipeline bubble",
        "GPU-hours",
        "MWh",
        "a checkpoint",
        "This run can start",
    ):
        assert part in text
    assert picture.stat().st_size > 20_000


def test_goodput_and_scaling_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-cn", "nemotron_nano_12b_v2", "run.global_rows=768"]
    status, found, _ = plan(capsys, *words, "--gpus", "64", "--goodput", "--node-mtbf-hours", "100", "--stall-s", "3")
    goodput = found["goodput"]
    assert status == 0 and goodput["nodes"] == 8 and goodput["failures"]["mean_s"] == 45_000
    young = next(choice for choice in goodput["choices"] if choice["name"] == "Young's")
    assert young["interval_s"] == pytest.approx((2 * 3 * 45_000) ** 0.5, abs=found["step_time_s"] / 2 + 1e-6)
    best = max(choice["goodput"] for choice in goodput["choices"])
    assert 0 < best - goodput["goodput"] < 2e-3 and goodput["goodput_with_memory_copies"] > best
    for choice in goodput["choices"]:
        assert choice["goodput"] == pytest.approx(choice["simulated"], abs=5 * choice["standard_error"] + 1e-4)

    picture = tmp_path / "goodput.png"
    assert main([*words, "--gpus", "64", "--goodput", "--picture", str(picture)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "Advised: checkpoint.every_steps=" in text and "(run.memory_copies)" in text and picture.stat().st_size > 20_000
    )

    status, found, _ = plan(capsys, *words, "--scale", "16,101", "--picture", str(tmp_path / "scale.png"))
    assert status == 1, "no layout of 101 GPUs divides 768 rows"
    fits, not_ = found["points"]
    assert fits["gpus"] == 16 and 0.9 < fits["goodput"] < 1 and fits["mfu"] > 0.4
    assert not not_["works"] and not_["reason"] and (tmp_path / "scale.png").stat().st_size > 20_000
    for wrong in (["--scale", "8;x"], ["--goodput", "--restart-s", "-3"]):
        assert main([*words, "--gpus", "64", *wrong]) == 2
        assert wrong[-1] in capsys.readouterr().err


def test_search_ranks_layouts_that_work_and_says_why(tmp_path: Path) -> None:
    recipe = recipe_with(
        **{
            "model.hidden": 4096, "model.ffn": 16384, "model.heads": 32, "model.kv_heads": 8, "model.head_dim": 128,
            "model.mamba_heads": 128, "model.mamba_head_dim": 64, "model.mamba_state": 128, "model.mamba_groups": 8,
            "model.mamba_chunk": 128, "model.pattern": "M-M*-M-" * 4, "model.vocab": 131072, "precision.params": "bf16",
            "data.row_tokens": 8192, "run.global_rows": 64,
            "data.folder": str(tmp_path), "run.folder": str(tmp_path),  # not what `make smoke` left here
        }
    )  # fmt: skip
    found = search(recipe, world=16, device=device_named("h100"), top=5)
    times = [candidate.plan.time.seconds for candidate in found.best]
    assert len(times) == 5 and times == sorted(times) and found.fitting >= 5
    assert all(candidate.plan.fits and candidate.why for candidate in found.best)
    assert found.rejected["do not fit in memory"] > 0
    assert found.tried == found.fitting + sum(found.rejected.values())
    for candidate in found.best:
        stages, layout = candidate.plan.stages, candidate.plan.layout
        assert "".join(stages) == recipe.model.pattern and len(stages) == layout.pipeline * layout.virtual


def test_search_names_the_rows_of_a_step_if_they_limit_it(tmp_path: Path) -> None:
    """Few rows for many GPUs: more of them use the GPUs better. With many rows nothing is named."""
    folders = {"data.folder": str(tmp_path), "run.folder": str(tmp_path)}
    device = device_named("h100")
    for rows, is_limit in ((16, True), (4096, False)):
        recipe = recipe_with(**folders, **{"run.global_rows": rows, "run.microbatch_rows": 1})
        found = search(recipe, world=16, device=device, top=1)
        text = limiting_field(recipe, found, world=16, device=device)
        assert bool(text) == is_limit, text
        if is_limit:
            assert text.startswith(
                "run.global_rows=16 limits the speed: 1 rows for each of 16 GPUs. With run.global_rows=64, "
            )


def test_search_tries_more_than_powers_of_two(tmp_path: Path) -> None:
    """12 GPUs and 24 rows: degrees of 3, 6 and 12, microbatches of 3 rows."""
    recipe = recipe_with(
        **{"run.global_rows": 72, "run.microbatch_rows": 1, "data.folder": str(tmp_path), "run.folder": str(tmp_path)}
    )
    plans = [one.plan for one in search(recipe, world=12, device=device_named("h100"), top=10_000).best]
    assert {3, 6} & {plan.layout.pipeline for plan in plans} and {plan.layout.data for plan in plans} >= {3, 6, 12}
    assert {plan.recipe.run.microbatch_rows for plan in plans} >= {1, 2, 3}


def test_devices_are_found_by_the_names_people_use() -> None:
    expected = {
        "H100": "h100", "DGX-H100": "h100", "h100_80gb": "h100", "NVIDIA H200": "h200", "DGX-GB200": "gb200", "B200": "b200",
        "DGX-GB300": "gb300", "a100_40gb": "a100_40gb", "A100 80GB": "a100_80gb", "A10G": "a10g", "L40S": "l40s",
        "RTX 4090": "rtx4090", "H100 96GB HBM2e 500W": "h100_500w", "B200 power-limited": "b200_power_limited", "l4": "l4",
        "A100-PCIE-40GB": "a100_pcie_40gb", "NVIDIA H200 NVL": "h200_nvl", "a40": "a40", "NVIDIA H100 80GB HBM2e": "h100_pcie",
        "H100 NVL 94GB": "h100_nvl", "GB200 NVL72": "gb200", "A3 H100 80GB": "h100", "NVIDIA A100 80GB PCIe": "a100_pcie",
    }  # fmt: skip
    assert {name: getattr(find_device(name), "name", None) for name in expected} == expected
    assert find_device("TPU v5p") is None
    assert {name: getattr(find_device(name), "name", None) for name in devices()} == {name: name for name in devices()}
    assert all(device.source and device.peak["bf16"] > 0 for device in devices().values())


@pytest.mark.parametrize(
    ("name", "bf16", "fp8", "fp32", "bandwidth", "watts", "memory_gib"),
    [
        # NVIDIA's data sheets: TFLOP/s as printed, with sparsity (fp32: without), GB/s, W. Memory, in GiB: what torch reports.
        ("A10", 250, None, 31.2, 600, 150, 22.06),
        ("A40", 299.4, None, 37.4, 696, 300, 45_416 / 1024),
        ("L4", 242, 485, 30.3, 300, 72, 22.16),
        ("L40S", 724, 1466, 91.6, 864, 350, 44.39),
        ("H200 NVL", 1671, 3341, 60, 4800, 600, 139.80),
        ("A100-PCIE-40GB", 624, None, 19.5, 1555, 250, 40_326 / 1024),
    ],
)
def test_devices_have_the_figures_of_their_data_sheets(
    name: str, bf16: float, fp8: float | None, fp32: float, bandwidth: float, watts: float, memory_gib: float
) -> None:
    device = device_named(name)
    assert 2 * device.peak["bf16"] == pytest.approx(bf16 * 1e12, rel=1e-3)
    assert device.peak.get("fp8", 0) * 2 == pytest.approx((fp8 or 0) * 1e12, rel=1e-3)
    assert device.peak["fp32"] == pytest.approx(fp32 * 1e12) and "fp4" not in device.peak
    assert device.hbm == pytest.approx(bandwidth * 1e9) and device.watts == watts
    assert device.memory_gib == pytest.approx(memory_gib, abs=0.01)


@pytest.mark.parametrize(
    ("typed", "near"),
    [("h1000", "h100"), ("b20", "b200"), ("a1000", "a100"), ("l400", "l40s"), ("h200nvl", "h200_nvl")],
)
def test_a_mistyped_device_is_not_taken_for_another(typed: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-cn", "smoke", "--gpus", "1", "--device", typed]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"--device {typed}: .*Did you mean [^?]*\b{near}", said), said


def test_the_compress_recipe_has_the_figures_of_the_device_table() -> None:
    a10g = device_named("A10G")
    assert (
        CompressConfig().device_gb_per_s == a10g.hbm / 1e9
        and CompressConfig().device_tflops == a10g.peak["bf16"] / 1e12
    )

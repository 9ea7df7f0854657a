"""The page of a report: opened in a browser, with hostile texts, of several runs, of a long run; without network access."""

import asyncio
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, open_page
from test_foreign_records import EVIL, READING, mutated_records
from test_report import MACHINE, RECIPE, begin, folder_of, step

from recipes.schema.errors import StratumError
from recipes.schema.mtp import MtpConfig
from recipes.schema.run_folder import METRICS
from train.align.dpo import DPO_PARTS
from train.align.policy_step import PARTS as POLICY_PARTS
from train.align.reward import REWARD_PARTS
from train.distill.objective import PARTS as DISTILL_PARTS
from train.objective.next_token import Z_LOSS_PARTS
from train.objective.several_tokens import parts_of
from train.report.command import main
from train.report.curves import thin
from train.report.facts import read_reported
from train.report.page import page
from train.report.titles import title_of_metric, title_of_part

STEPS = [
    step(
        n,
        8.0 - n / 10,
        time=1.7e9 + 2 * n,
        seconds={"data": 0.25, "forward_backward": 0.5},
        loss_parts={"margin": n / 40},
    )
    for n in range(1, 41)
]
ACCURACY = {"value": 0.5, "low": 0.2, "high": 0.8}
ROLLOUTS = {
    "reward_std": 0.25, "ended": 1.0, "entropy": 0.5, "answer_tokens_mean": 4.0, "answer_tokens_max": 7, "informative": 0.5,
    "log_prob_gap": {"max": 1e-6, "mean": 1e-7}, "generation_s": 1.5, "judging_s": 0.1,
    "verifiers": {EVIL: {"answers": 8, "passed": 6, "failures": {"timeout": 1}}},
}  # fmt: skip
RICH: list[dict[str, Any]] = [
    MACHINE | {"time": 1.7e9},
    begin("start", 0) | {"time": 1.7e9 + 1},
    {"kind": "evaluation", "step": 0, "bits_per_byte": {"verse": 4.0, EVIL: 3.0}, "time": 1.7e9 + 1},
    *STEPS[:20],
    {"kind": "save", "step": 20, "seconds": 0.5, "time": 1.7e9 + 41},
    MACHINE | {"time": 1.7e9 + 41.5},
    begin("resume", 20) | {"time": 1.7e9 + 41.6, "text": EVIL},
    *STEPS[20:],
    {"kind": "evaluation", "step": 40, "bits_per_byte": {"verse": 2.0, EVIL: math.nan}, "time": 1.7e9 + 82},
    {"kind": "precision", "step": 20, "scaling": EVIL, "readings": [READING], "time": 1.7e9 + 82},
    {"kind": "precision", "step": 40, "scaling": "current", "readings": [READING | {"snr_db": None}], "time": 1.7e9 + 83},
    {"kind": "tasks", "step": 40, "tasks": {EVIL: {"items": 3, "metrics": {"accuracy": ACCURACY}}}},
    *({"kind": "rollouts", "step": n, "reward_mean": n / 40, "time": 1.7e9 + 83, **ROLLOUTS} for n in (1, 40)),
    {"kind": "rollouts", "step": 41, "verifiers": [], "log_prob_gap": None},
    *({"kind": "samples", "step": n, "samples": [{"prompt": f"Once {EVIL}", "text": f" upon {n} times"}]} for n in (0, 20, 40)),
    {"kind": "rollout_samples", "step": 40, "samples": [{"prompt": EVIL, "answer": "</script>", "reward": 1.0}]},
    {"kind": "warning", "text": EVIL, "time": 1.7e9 + 84},
]  # fmt: skip


def run_folder(parent: Path, name: str, lines: list[dict[str, Any]], **changes: Any) -> Path:
    folder = parent / name
    folder.mkdir()
    folder_of(folder, lines)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE | changes))
    return folder


def embedded(html: str) -> dict[str, Any]:
    """The data of a page, as its script reads it."""
    (found,) = re.findall('<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    loaded: dict[str, Any] = json.loads(found)
    return loaded


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: tests/install_chromium.sh")
def test_a_report_in_a_browser(tmp_path: Path) -> None:
    """Charts, linked zoom, another axis, hostile texts, a phone, dark colours, two runs: one page each, no error, no request."""
    one = run_folder(tmp_path, "one", RICH)
    (one / "sample.txt").write_text(f"To be {EVIL}")
    (one / "profile" / "steps_2").mkdir(parents=True)
    table = [{"name": f"aten::mm {EVIL}", "calls": 3, "seconds": 0.5, "share": 0.25}, {"name": 3}, 7]
    (one / "profile" / "steps_2" / "rank-00000.table.json").write_text(json.dumps(table))
    two = run_folder(tmp_path, "two <b>", RICH, optim={"lr": 0.5})
    assert main([str(one)]) == 0
    assert main([str(one), str(two), "--out", str(tmp_path / "both.html")]) == 0

    async def use() -> None:
        async with open_page((one / "report.html").as_uri()) as view:
            await view.wait_for("document.querySelectorAll('canvas').length == charts.length && charts.length > 8")
            requests = "performance.getEntriesByType('resource').map(entry => entry.name)"
            assert await view.evaluate(requests) == []
            texts = await view.evaluate("document.body.innerText")
            for part in (
                "Held-out text",
                "Reward of the better minus",
                "goodput",
                "Low precision",
                "stopped",
                "To be <script>",
                "Abacus 2000",
                "aten::mm",
            ):
                assert part in texts, part
            assert (
                await view.evaluate(
                    "document.querySelectorAll('main script, main b b, main img, main a[href^=http]').length"
                )
                == 0
            )
            assert "upon 40 times" in texts and "upon 20 times" not in texts
            await view.evaluate("document.querySelector('.leaf button').onclick()")
            assert "upon 20 times" in await view.evaluate("document.body.innerText")
            shown = "charts.map(chart => [chart.plot.scales.x.min, chart.plot.scales.x.max])"
            await view.evaluate("setZoom([10, 20])")
            await view.wait_for(f"{shown}.every(([low, high]) => low == 10 && high == 20)")
            await view.evaluate(
                "const chosen = document.getElementById('axis'); chosen.value = 'tokens'; chosen.onchange()"
            )
            await view.wait_for("charts[0].plot.data[0].at(-1) == 4000")  # 100 tokens a step
            await view.evaluate("document.querySelector('.panel button').onclick()")
            await view.wait_for("charts.find(chart => chart.spec.log).plot.scales.y.distr == 3")
            for name, width, dark in (("wide", 1300, False), ("phone", 390, True)):
                await view.look(width=width, height=900, dark=dark)
                await view.wait_for("document.documentElement.scrollWidth <= innerWidth", seconds=10)
                await view.screenshot(tmp_path / f"{name}.png")
            assert not view.errors
        async with open_page((tmp_path / "both.html").as_uri()) as view:
            await view.wait_for("document.querySelectorAll('canvas').length == charts.length && charts.length > 8")
            texts = await view.evaluate("document.body.innerText")
            assert "optim.lr" in texts and "two <b>" in texts
            assert await view.evaluate("charts[0].plot.series.length") == 5  # steps; loss and mean of two runs
            assert not view.errors

    asyncio.run(use())


def test_the_page_has_what_the_run_recorded(tmp_path: Path) -> None:
    html = page([read_reported(run_folder(tmp_path, "run", RICH))])
    data = embedded(html)
    (run,) = data["runs"]
    assert (
        run["state"] == "finished" and run["tiles"]["goodput"] == f"{100 * 20 / 84:.1f} %"
    )  # 40 steps of 0.5 s in 84 s
    assert run["timeline"]["marks"] == [[round(41 / 84, 5), "save", 20], [round(41.6 / 84, 5), "resume", 20]]
    charts = {chart["title"]: chart for section in data["charts"].values() for chart in section}
    assert charts["Held-out text"]["runs"][0][0]["values"] == [4.0, 2.0]
    assert charts["Reward of a batch's answers, mean and deviation"]["runs"][0][0]["high"] == [0.275, 1.25, None]
    assert charts["Answers with the full reward, by kind of verifier"]["runs"][0][0]["values"] == [75.0, 75.0]
    gap = charts["Log-probability of a token, sampler and trainer apart"]["runs"][0]
    assert [curve["label"] for curve in gap] == ["largest", "mean"]
    assert charts["Accuracy"]["runs"][0][0]["low"] == [20.0] and charts["Accuracy"]["unit"] == "%"
    assert charts["Answers that ended by themselves"]["runs"][0][0]["values"] == [100.0, 100.0]
    assert "Policy loss" in charts and "Training loss" not in charts, "a policy's loss is not in nats"
    assert run["precision"]["rows"][0][2] == [30.0, None]
    assert run["data"]["note"] and data["differences"] == []
    assert "http" not in re.sub(r"/\*!.*?\*/", "", html.replace("http-equiv", "")).replace(
        "http://www.w3.org/2000/svg", ""
    ).replace("http://d", "")


def test_a_source_that_only_one_run_has_is_one_difference(tmp_path: Path) -> None:
    """Every field of an absent source was a difference."""
    folders = [run_folder(tmp_path, name, RICH) for name in ("one", "two")]
    for folder, name in zip(folders, ("texts", "pairs"), strict=True):
        recipe = json.loads((folder / "recipe.yaml").read_text())
        recipe.setdefault("data", {})["sources"] = {
            "both": {"path": "b.jsonl", "weight": 1.0 if name == "texts" else 2.0},
            name: {"path": f"{name}.jsonl", "weight": 1.0, "format": "jsonl"},
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
    rows = embedded(page([read_reported(folder) for folder in folders]))["differences"]
    assert [row for row in rows if row[0].startswith("data.sources")] == [
        ["data.sources.both.weight", "1.0", "2.0"],
        ["data.sources.pairs", "no such source", "pairs.jsonl"],
        ["data.sources.texts", "texts.jsonl", "no such source"],
    ]


def test_every_part_of_a_loss_has_a_title() -> None:
    """Charts were headed by recorded names, such as `clipped low`, without a unit."""
    parts = {*DPO_PARTS, *REWARD_PARTS, *POLICY_PARTS, *DISTILL_PARTS, *Z_LOSS_PARTS, *parts_of(MtpConfig(depths=2))}
    plain = {name for name in parts if title_of_part(name).text.lower() == name.replace("_", " ")}
    assert not plain and title_of_part("mtp_1").text == "Loss of token 2 ahead"
    assert len({title_of_part(name).text for name in parts}) == len(parts)
    assert title_of_part("own_part").text == "Own part"
    assert title_of_metric("accepted_2").text == "Accepted guesses of all depths up to 2"


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    """20,000 steps: at most 2,000 points a curve, whose bands keep the highest and lowest value of every step."""
    losses = [math.sin(n) + (100.0 if n == 12_345 else 0.0) for n in range(1, 20_001)]
    lines = [begin("start", 0), *(step(n, loss) for n, loss in enumerate(losses, start=1))]
    html = page([read_reported(run_folder(tmp_path, "long", lines))])
    assert len(html) < 700_000
    curve = thin("", range(1, 20_001), losses)
    assert len(curve.values) == 2000 and curve.steps[-1] == 20_000
    assert curve.high is not None and curve.low is not None
    assert max(curve.high) == max(losses) and min(curve.low) == min(losses)
    assert math.isclose(sum(curve.values) * 10, sum(losses), rel_tol=1e-9)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)], ids=["few", "many"])
def test_a_damaged_record_gives_a_page_or_one_error(count: int, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "run", RICH)
    for name, content in mutated_records(count, 3):
        (folder / METRICS).write_bytes(content)
        try:
            html = page([read_reported(folder)])
        except StratumError:
            continue
        assert "</script" not in json.dumps(embedded(html)["runs"][0]["name"]), name


def test_wrong_commands_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run_folder(tmp_path, "one", RICH), run_folder(tmp_path, "two", RICH)
    (two / "recipe.yaml").write_text(json.dumps({"run": {"steps": "x"}, "model": {}}))
    for words, reason in (
        ([str(one), str(one)], "--out"),
        ([str(one), str(one), "--sample", "x"], "--sample"),
        ([str(one), "--out", str(tmp_path)], "is a folder"),
        ([str(two)], "run.steps"),
        ([str(tmp_path)], "not a run folder"),
    ):
        assert main(words) == 2
        assert reason in capsys.readouterr().err

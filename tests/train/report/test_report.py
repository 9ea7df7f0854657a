"""Reports match the run's files: numbers computed by hand, a real picture, helpful errors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from recipes.schema.errors import StratumError
from recipes.schema.run_folder import METRICS
from train.report.command import main
from train.report.summary import read_run, smooth, write_report

RECIPE = {"model": {"pattern": "M-", "hidden": 8}, "precision": {"params": "fp32"}, "run": {"steps": 8}}


def step(number: int, loss: float, **changes: Any) -> dict[str, Any]:
    line = {
        "kind": "step",
        "step": number,
        "tokens": 100 * number,
        "loss": loss,
        "grad_norm": 1.0 + number,
        "learning_rate": 1e-3,
        "seconds": {"data": 0.1, "forward_backward": 0.3, "optimizer": 0.1},
        "step_s": 0.5,
        "tokens_per_s": 200.0,
        "mfu": 0.25,
        "memory_bytes": 3 * 2**30,
    }
    return line | changes


def begin(kind: str, number: int, layout: str = "TP1 PP1 DP1") -> dict[str, Any]:
    return {"kind": kind, "step": number, "parameters": 1234567, "layout": layout, "device": "cpu"}


MACHINE = {"kind": "machine", "cpu": "Abacus 2000", "device": "cpu", "threads": 2, "torch": "9.9", "python": "3.12"}
LINES = [
    MACHINE,
    begin("start", 0),
    {"kind": "evaluation", "step": 0, "bits_per_byte": {"verse": 4.0, "code": 3.0}},
    *(step(number, 8.0 - number) for number in range(1, 7)),
    MACHINE | {"peak_flops": 1.5e11},
    begin("resume", 4),
    *(step(number, 8.0 - number) for number in range(5, 9)),
    {"kind": "phase", "name": "saving", "seconds": 1.5},
    {"kind": "phase", "name": "saving", "seconds": 0.5},
    {"kind": "evaluation", "step": 8, "bits_per_byte": {"verse": 2.0, "code": 1.5}},
]


def folder_of(path: Path, lines: list[dict[str, Any]]) -> Path:
    (path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "recipe.yaml").write_text(json.dumps(RECIPE))
    return path


def test_a_report_says_what_happened(tmp_path: Path) -> None:
    write_report(folder_of(tmp_path, LINES), sample="To be")
    text = (tmp_path / "summary.md").read_text()
    for part in (
        "1,234,567 parameters",
        "| steps | 8 of 8 |",
        "| tokens | 800 |",
        "7.0000 -> 0.0000 nats",
        "200 tokens/s",
        "25.0 % of the measured fp32 peak of 0.15 TFLOP/s",
        "3.00 GiB",
        "Abacus 2000, 2 threads a process; torch 9.9",
        "| verse | 4.000 | 2.000 |",
        "| code | 3.000 | 1.500 |",
        "| forward_backward | 300.0 | 60.0 % |",
        "saving 2.0 s; steps took 4.0 s",
        "- resumed after step 4",
        "2 of 2 steps that ran more than once gave bitwise the same loss and gradient norm.",
        "```\nTo be\n```",
        "[metrics.jsonl](metrics.jsonl)",
    ):
        assert part in text, part


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    from matplotlib import image

    write_report(folder_of(tmp_path, LINES))
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.05


def test_a_distilled_run_says_whom_it_learned_from_and_what_its_loss_is(tmp_path: Path) -> None:
    folder_of(tmp_path, LINES)
    run = RECIPE["run"] | {"start_from": "runs/cut"}
    objective = {"kind": "distill", "teacher": "runs/large", "divergence": "kl", "next_token_weight": 0.5}
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE | {"run": run, "objective": objective}))
    write_report(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "| started from | `runs/cut` |" in text and "| teacher | `runs/large` |" in text
    assert "| training loss (divergence from the teacher, mixed) | 7.0000 -> 0.0000 nats per token |" in text


def test_a_report_says_how_many_labels_were_learned(tmp_path: Path) -> None:
    write_report(folder_of(tmp_path, [begin("start", 0), *(step(n, 1.0, labels=10 * n) for n in (1, 2, 3))]))
    assert "| learned labels | 60, 20.0 % of the tokens; 10 to 30 a step |" in (tmp_path / "summary.md").read_text()


def test_steps_that_differ_after_a_resume_are_reported(tmp_path: Path) -> None:
    other = [*LINES[:11], begin("resume", 4, layout="TP2 PP1 DP1"), step(5, 3.25), step(6, 2.0), step(7, math.pi)]
    write_report(folder_of(tmp_path, other))
    text = (tmp_path / "summary.md").read_text()
    assert "1 of 2 steps that ran more than once" in text
    assert "Largest difference in loss: 0.25 nats" in text
    assert "The layout changed (TP1 PP1 DP1, TP2 PP1 DP1)" in text


def test_a_gradient_norm_that_differs_is_a_difference(tmp_path: Path) -> None:
    write_report(folder_of(tmp_path, [*LINES[:-1], step(8, 0.0, grad_norm=9.000000000000002)]))
    assert "2 of 3 steps" in (tmp_path / "summary.md").read_text()


def test_steps_run_again_without_a_checkpoint_count_too(tmp_path: Path) -> None:
    """A run killed before the first save starts again: the same steps run twice without a resume."""
    write_report(folder_of(tmp_path, [begin("start", 0), step(1, 7.0), begin("start", 0), step(1, 7.0), step(2, 6.0)]))
    assert "1 of 1 steps" in (tmp_path / "summary.md").read_text()


def test_losses_that_are_nan_do_not_stop_a_report(tmp_path: Path) -> None:
    lines = [begin("start", 0), step(1, 7.0), step(2, 0.0) | {"loss": "NaN"}, step(3, 0.0) | {"loss": "Infinity"}]
    write_report(folder_of(tmp_path, lines))
    assert math.isnan(read_run(tmp_path).steps[2]["loss"])
    assert "7.0000 -> inf nats" in (tmp_path / "summary.md").read_text()


NOT_FINITE = ("NaN", "Infinity", "-Infinity", "a text", None)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_score_that_is_not_a_number_does_not_stop_a_report(value: str | None, tmp_path: Path) -> None:
    """As old records store them (nested values stayed text), as new ones do, and as manual edits may leave them."""
    sick = step(2, 0.0) | dict.fromkeys(("loss", "grad_norm", "learning_rate", "tokens_per_s", "mfu", "labels"), value)
    scores = [{"kind": "evaluation", "step": at, "bits_per_byte": {"a": value, "NaN": value}} for at in (0, 2)]
    write_report(folder_of(tmp_path, [begin("start", 0), scores[0], step(1, 7.0), sick, step(3, 1.0), scores[1]]))
    shown = {"Infinity": "inf", "-Infinity": "-inf"}.get(str(value), "nan")
    assert f"| NaN | {shown} | {shown} |" in (tmp_path / "summary.md").read_text()
    reading = {
        "layer": 0, "linear": "in_proj", "operand": "input", "format": "e4m3", "amax": value, "saturated": value,
        "underflowed": 0.0, "floor_db": 10.0, "snr_db": value,
    }  # fmt: skip
    write_report(
        folder_of(
            tmp_path,
            [begin("start", 0), step(1, 7.0), {"kind": "precision", "step": 1, "scaling": "x", "readings": [reading]}],
        )
    )


def test_the_reported_loss_of_a_run_is_a_mean_over_steps(tmp_path: Path) -> None:
    """Forty steps around 8 and then around 4, each off by up to a half: a tenth is four steps."""
    noise = (0.5, -0.5, 0.25, -0.25)
    lines = [begin("start", 0), *(step(n, (8.0 if n <= 20 else 4.0) + noise[n % 4]) for n in range(1, 41))]
    write_report(folder_of(tmp_path, lines))
    assert (
        "8.0000 -> 4.0000 nats per token (means of the first and last 4 steps)" in (tmp_path / "summary.md").read_text()
    )


@pytest.mark.parametrize("count", [5, 40, 400])
def test_the_running_mean_ends_in_a_mean(count: int) -> None:
    values = [float(n % 2) for n in range(count)]
    means = smooth(values)
    assert len(means) == count
    for raw, mean in ((values[0], means[0]), (values[-1], means[-1])):
        assert 0 < mean < 1 and mean != raw


def test_a_stored_sample_stays_in_the_summary(tmp_path: Path) -> None:
    folder_of(tmp_path, LINES)
    (tmp_path / "sample.txt").write_text("with ``` inside")
    write_report(tmp_path)
    assert "````\nwith ``` inside\n````" in (tmp_path / "summary.md").read_text()


def test_a_run_without_steps(tmp_path: Path) -> None:
    write_report(folder_of(tmp_path, LINES[:2]))
    assert "No step is finished yet." in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "loss.png").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("Out, out")
    assert main([str(folder_of(tmp_path, LINES)), "--sample", str(tmp_path / "text")]) == 0
    assert "Out, out" in (tmp_path / "summary.md").read_text()
    assert "summary.md" in capsys.readouterr().out


def test_a_report_of_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StratumError, match="is not a run folder"):
        read_run(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "Give one, e.g. runs/smoke" in capsys.readouterr().err
    (tmp_path / METRICS).write_text("")
    with pytest.raises(StratumError, match=r"recipe\.yaml cannot be read"):
        write_report(tmp_path)


def test_a_low_precision_run_gets_a_picture_and_a_table(tmp_path: Path) -> None:
    def measured(number: int, low: float | None) -> dict[str, Any]:
        reading = {
            "linear": "mlp.linear_fc1", "format": "e4m3", "amax": 0.25, "scale": 1792.0, "saturated": 0.125,
            "underflowed": 0.5, "floor_db": 20.0,
        }  # fmt: skip
        values = {(1, "input"): 31.0, (1, "grad"): low, (3, "input"): 30.0}
        return {
            "kind": "precision",
            "step": number,
            "scaling": "blockwise",
            "readings": [{"layer": at, "operand": name, "snr_db": v, **reading} for (at, name), v in values.items()],
        }

    lines = [*LINES, measured(4, 12.5), measured(4, 13.5), measured(8, None)]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    precision = {"params": "bf16", "scaling": "blockwise", "switch_at_tokens": 700, "scaling_after": "none"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE | {"precision": precision}))
    write_report(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "| precision | bf16, linear layers in blockwise, none from token 700 |" in text
    assert "At 1 of 2 measured steps an operand was below its lower limit, first at step 4." in text
    assert "| 3 | mlp.linear_fc1 | input | e4m3 | 30.0 | 0.25 | 12.50% | 50.00% |" in text
    assert text.index("30.0 | 0.25") < text.index("inf | 0.25"), "the operand that lost most comes first"
    assert (tmp_path / "precision.png").read_bytes()[:4] == b"\x89PNG"

"""Records survive kills and read back to the same bits; one reduction an interval; nothing optional can stop a run."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from train.config import TelemetryConfig
from train.errors import StratumError
from train.report import main, read_run, write_report
from train.telemetry import METRICS, Telemetry, peak_flops, read_metrics


class Reducer:
    """Counts how often, and how many values, were reduced; doubles them as two ranks would."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        self.sizes.append(values.numel())
        return values.mul_(2)


def recorder(folder: Path, reduce: Reducer, **changes: object) -> Telemetry:
    fields: dict[str, object] = {"log_every_steps": 4, "tensorboard": False, "progress": False}
    return Telemetry(
        folder,
        TelemetryConfig(**{**fields, **changes}),  # type: ignore[arg-type]
        is_writer=True,
        reduce=reduce,
        device=torch.device("cpu"),
        total_steps=10,
        first_step=0,
        tokens_per_step=100,
        flops_per_token=1e6,
        peak_flops=1e9,
        recipe_dict={"a": 1},
    )


def losses() -> list[torch.Tensor]:
    return list(torch.rand(10, generator=torch.Generator().manual_seed(0)) * 7)


def run(telemetry: Telemetry, values: list[torch.Tensor], first: int = 1) -> None:
    for step, loss in enumerate(values, start=first):
        seconds = {"data": 0.1, "forward_backward": 0.3, "optimizer": 0.1}
        telemetry.record(step, loss=loss, grad_norm=1.5, learning_rate=1e-3, seconds=seconds)
    telemetry.flush()


def test_losses_read_back_to_the_same_bits_with_one_reduction_an_interval(tmp_path: Path) -> None:
    reduce = Reducer()
    telemetry = recorder(tmp_path, reduce)
    run(telemetry, losses())
    telemetry.close()
    lines = read_metrics(tmp_path / METRICS)
    assert reduce.sizes == [4, 4, 2]
    for line, loss in zip(lines, losses(), strict=True):
        assert torch.tensor(line["loss"]).equal(loss * 2)
        assert line["tokens_per_s"] == pytest.approx(200) and line["mfu"] == pytest.approx(0.2)
        assert line["tokens"] == line["step"] * 100


def test_a_torn_line_is_closed_off_and_skipped(tmp_path: Path) -> None:
    telemetry = recorder(tmp_path, Reducer())
    run(telemetry, losses()[:4])
    telemetry.close()
    path = tmp_path / METRICS
    path.write_text(path.read_text() + '{"kind": "step", "st')
    again = recorder(tmp_path, Reducer())
    again.event("resume", step=2, parameters=1, layout="TP1")
    run(again, losses()[2:4], first=3)
    again.close()
    record = read_run(tmp_path)
    assert sorted(record.steps) == [1, 2, 3, 4] and record.resumes == [2]
    assert record.repeated == {3: [record.steps[3]["loss"]] * 2, 4: [record.steps[4]["loss"]] * 2}


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = recorder(tmp_path, Reducer(), tensorboard=True)
    run(telemetry, losses())
    telemetry.evaluation(10, {"verse": 2.5})
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 11))
    assert events.Scalars("heldout_bits_per_byte/verse")[0].value == 2.5


def test_weights_and_biases_never_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    telemetry = recorder(tmp_path, Reducer(), wandb="online")
    run(telemetry, losses())
    telemetry.close()
    lines = read_metrics(tmp_path / METRICS)
    assert lines[0]["kind"] == "warning" and "Weights & Biases is off" in lines[0]["text"]
    assert len(lines) == 11


@pytest.mark.slow
def test_weights_and_biases_works_without_a_network(tmp_path: Path) -> None:
    telemetry = recorder(tmp_path, Reducer(), wandb="offline")
    run(telemetry, losses())
    telemetry.close()
    assert list(tmp_path.rglob("*.wandb"))


def test_the_measured_peak_is_a_sensible_number() -> None:
    peak = peak_flops(torch.device("cpu"))
    assert peak is not None and 1e9 < peak < 1e14


def test_a_report_says_what_happened(tmp_path: Path) -> None:
    telemetry = recorder(tmp_path, Reducer())
    telemetry.event("start", step=0, parameters=1234, layout="TP1 PP1 DP1", device="cpu")
    telemetry.evaluation(0, {"verse": 4.0, "code": 3.0})
    run(telemetry, losses()[:6])
    telemetry.event("resume", step=4, parameters=1234, layout="TP1 PP1 DP1", device="cpu")
    run(telemetry, losses()[4:], first=5)
    telemetry.evaluation(10, {"verse": 2.0, "code": 1.5})
    telemetry.close()
    recipe = {"model": {"pattern": "M-", "hidden": 8}, "precision": {"params": "fp32"}, "run": {"steps": 10}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    write_report(tmp_path, sample="To be")
    text = (tmp_path / "summary.md").read_text()
    for part in ("1,234 parameters", "| verse | 4.000 | 2.000 |", "2 of 2 steps", "To be", "200 tokens/s"):
        assert part in text
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert not math.isnan(read_run(tmp_path).steps[10]["loss"])


def test_a_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StratumError, match="is not a run folder"):
        read_run(tmp_path)
    assert main([str(tmp_path)]) == 2

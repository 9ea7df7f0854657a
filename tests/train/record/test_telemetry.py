"""Records survive kills and read back to the same bits; one reduction per interval; no display can stop a run."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recipes.schema.errors import StratumError
from recipes.schema.run_folder import METRICS, read_metrics
from recipes.schema.telemetry import TelemetryConfig
from train.precision.control import Reading
from train.record.displays import Screen
from train.record.machine import peak_by_name, peak_flops
from train.record.metrics import JsonLines
from train.record.stopwatch import Stopwatch
from train.record.telemetry import Telemetry
from train.report.summary import read_run


class Reducer:
    """Counts how often, and how many values, were reduced; doubles them as two ranks would."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        self.sizes.append(values.numel())
        return values.mul_(2)


def recorder(folder: Path, reduce: Reducer, *, total_steps: int = 10, **changes: object) -> Telemetry:
    fields: dict[str, object] = {"log_every_steps": 4, "tensorboard": False, "progress": False}
    return Telemetry(
        folder,
        TelemetryConfig(**{**fields, **changes}),  # type: ignore[arg-type]
        is_writer=True,
        reduce=reduce,
        device=torch.device("cpu"),
        total_steps=total_steps,
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
    assert lines[0]["kind"] == "machine" and lines[0]["torch"] == torch.__version__
    for line, loss in zip(lines[1:], losses(), strict=True):
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
    again.event("resume", step=2, parameters=1, layout="TP1", precision="fp32")
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
    assert [line["kind"] for line in lines[1:]] == ["machine", *["step"] * 10]


class Backend:
    """Stands in for the wandb module: a run whose methods fail from the given call on."""

    Settings = SimpleNamespace
    starting_step = 0

    def __init__(self, fail_at: int) -> None:
        self.calls, self.fail_at, self.asked = 0, fail_at, {}  # type: ignore[var-annotated]

    def _call(self) -> None:
        self.calls += 1
        if self.calls >= self.fail_at:
            raise ConnectionError("no route")

    def init(self, **asked: object) -> "Backend":
        self.asked = dict(asked)
        self._call()
        return self

    def define_metric(self, *_names: str, **_asked: str) -> None:
        pass

    def log(self, _scalars: dict[str, float], *, step: int) -> None:
        self._call()

    def finish(self) -> None:
        self._call()


@pytest.mark.parametrize("fail_at", [1, 4, 12])
def test_weights_and_biases_may_fail_at_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    backend = Backend(fail_at)  # call 1 is init, 2 to 11 are steps, 12 is finish
    monkeypatch.setitem(sys.modules, "wandb", backend)
    telemetry = recorder(tmp_path, Reducer(), wandb="online")
    run(telemetry, losses())
    telemetry.close()
    lines = read_metrics(tmp_path / METRICS)
    warnings = [line["text"] for line in lines if line["kind"] == "warning"]
    assert warnings == ["Weights & Biases is off from now on: ConnectionError: no route"]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 11))
    assert backend.calls == fail_at


def test_a_resumed_run_keeps_its_name_at_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for _ in range(2):
        backend = Backend(99)
        monkeypatch.setitem(sys.modules, "wandb", backend)
        recorder(tmp_path, Reducer(), wandb="online").close()
        asked.append((backend.asked["id"], backend.asked["resume"]))
    assert asked[0] == asked[1] and asked[0][1] == "allow"


def test_the_terminal_comes_back_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank's log is on the same disk as its run."""
    telemetry, values = recorder(tmp_path, Reducer()), losses()
    full = SimpleNamespace(write=lambda text: None, flush=_raise_full)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        run(telemetry, values[:4])
    run(telemetry, values[4:], first=5)
    telemetry.close()
    said = capsys.readouterr().err
    assert "step 8/10" in said and "off from now on" not in said


def _raise_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_tensorboard_that_fails_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    telemetry = recorder(tmp_path, Reducer(), tensorboard=True)
    run(telemetry, losses())
    telemetry.close()
    lines = read_metrics(tmp_path / METRICS)
    assert "TensorBoard is off" in lines[0]["text"] and sum(line["kind"] == "step" for line in lines) == 10


def test_nan_and_infinity_are_strict_json_and_read_back(tmp_path: Path) -> None:
    telemetry = recorder(tmp_path, Reducer())
    run(telemetry, [torch.tensor(value) for value in (math.nan, math.inf, -math.inf, 1.0)])
    telemetry.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for text in (tmp_path / METRICS).read_text().splitlines():
        json.loads(text, parse_constant=refuse)
    values = [line["loss"] for line in read_metrics(tmp_path / METRICS) if line["kind"] == "step"]
    assert math.isnan(values[0]) and values[1:] == [math.inf, -math.inf, 2.0]


def test_a_value_reads_back_as_what_it_was_at_any_depth(tmp_path: Path) -> None:
    """NaN in a nested record stays a number, and a text that reads like a number stays a text, apostrophes and all."""
    names = ["NaN", "Infinity", "-Infinity", "'NaN", "''-Infinity", "nan", "NaN ", "'", "it's"]
    record = {
        "kind": "x", "bits_per_byte": {"NaN": math.nan, "b": math.inf, "c": 1.5}, "source": "NaN",
        "readings": [{"snr_db": -math.inf, "layer": "Infinity"}, names], "none": None,
    }  # fmt: skip
    stream = JsonLines(tmp_path / METRICS)
    stream.write([record])
    stream.close()
    (line,) = read_metrics(tmp_path / METRICS)
    assert math.isnan(line["bits_per_byte"].pop("NaN")) and math.isnan(record["bits_per_byte"].pop("NaN"))  # type: ignore
    assert line == record


def test_other_ranks_reduce_and_write_nothing(tmp_path: Path) -> None:
    reduce = Reducer()
    silent = Telemetry(
        tmp_path / "run",
        TelemetryConfig(log_every_steps=4, wandb="online"),
        is_writer=False,
        reduce=reduce,
        device=torch.device("cpu"),
        total_steps=10,
        first_step=0,
        tokens_per_step=100,
        flops_per_token=1.0,
        peak_flops=None,
        recipe_dict={},
    )
    with silent.phase("evaluating"):
        silent.evaluation(0, {"verse": 1.0})
    run(silent, losses())
    silent.close()
    assert reduce.sizes == [4, 4, 2] and not (tmp_path / "run").exists()


def test_steps_before_a_failure_are_recorded_without_reducing(tmp_path: Path) -> None:
    reduce = Reducer()
    telemetry = recorder(tmp_path, reduce)
    telemetry.record(1, loss=torch.tensor(1.0), grad_norm=torch.tensor(3.5), learning_rate=1e-3, seconds={"data": 0.5})
    telemetry.close()
    last = read_metrics(tmp_path / METRICS)[-1]
    assert reduce.sizes == [] and last["kind"] == "unreduced_step"
    assert (last["step"], last["loss"], last["grad_norm"], last["tokens_per_s"]) == (1, None, 3.5, 200)


def test_the_loss_is_freed(tmp_path: Path) -> None:
    """A recorded loss must not keep its graph, nor be read back from the device, before the flush."""
    telemetry = recorder(tmp_path, Reducer())
    weight = torch.ones((), requires_grad=True)
    with torch.device("meta"):  # a device that cannot be read back
        unread = torch.empty(())
    telemetry._losses = telemetry._losses.to("meta")
    for value in (weight * 2, unread):
        seconds = {"data": 1.0}
        telemetry.record(1, loss=value.to("meta"), grad_norm=1.0, learning_rate=1.0, seconds=seconds)
    assert not telemetry._losses.requires_grad
    telemetry.close()


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    telemetry = recorder(tmp_path, Reducer())

    class Full:
        def write(self, _text: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    telemetry._record._stream.close()  # type: ignore[union-attr]
    telemetry._record._stream = Full()  # type: ignore[union-attr, assignment]
    with pytest.raises(StratumError, match=r"metrics\.jsonl cannot be written: No space left.*Free some space"):
        telemetry.event("save", step=1, path="x")


class FakeEvent:
    """An event on a device whose clock the test sets; it records who waits for it."""

    clock_ms = 0.0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock_ms

    def synchronize(self) -> None:
        FakeEvent.waits += 1

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


def test_laps_on_a_gpu_are_the_devices_and_wait_for_nothing_before_the_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    telemetry = recorder(tmp_path, Reducer())  # an interval of four steps
    for step in range(1, 5):
        watch = Stopwatch(torch.device("cuda"))
        for name, milliseconds in (("forward_backward", 300), ("optimizer", 100), ("optimizer", 20)):
            FakeEvent.clock_ms += milliseconds
            watch.lap(name)
        assert FakeEvent.waits == 0
        telemetry.record(step, loss=torch.tensor(1.0), grad_norm=1.0, learning_rate=0.1, seconds=watch.seconds)
    telemetry.close()
    lines = [line for line in read_metrics(tmp_path / METRICS) if line["kind"] == "step"]
    assert len(lines) == 4 and FakeEvent.waits > 0
    for line in lines:
        assert line["seconds"] == pytest.approx({"forward_backward": 0.3, "optimizer": 0.12})
        assert line["step_s"] == pytest.approx(0.42)


def test_megatron_does_not_bring_folders_of_weights_and_biases_along(tmp_path: Path) -> None:
    """Its import makes two in TMPDIR, which a kill leaves there; W&B itself can still be imported afterwards."""
    program = "import sys, train.megatron; assert 'wandb' not in sys.modules; import os; os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert [path.name for path in tmp_path.iterdir() if "wandb" in path.name] == []


def test_phases_are_timed(tmp_path: Path) -> None:
    telemetry = recorder(tmp_path, Reducer())
    with telemetry.phase("saving"):
        pass
    telemetry.close()
    last = read_metrics(tmp_path / METRICS)[-1]
    assert (last["kind"], last["name"]) == ("phase", "saving") and 0 <= last["seconds"] < 1


def test_the_line_of_grpo_shows_the_newest_reward_and_the_divergence(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(9, 0, live=False)
    step = {"kind": "step", "step": 4, "loss": 0.5, "tokens_per_s": 200.0, "tokens": 8, "learning_rate": 0.1}
    step["loss_parts"] = {"kl": 0.0125}
    rewards = [{"kind": "rollouts", "reward_mean": value} for value in (0.25, 0.75, None)]
    screen.write([*rewards, step])
    screen.close()
    assert "reward 0.750  KL 0.0125  loss 0.5000  200 tok/s" in capsys.readouterr().err


def test_a_plain_line_an_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = recorder(tmp_path, Reducer(), progress=True)  # captured output is not a terminal
    run(telemetry, losses())
    telemetry.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["4/10", "8/10", "10/10"]
    assert all("loss " in line and "200 tok/s" in line and "MFU 20 %" in line for line in lines)


def test_a_live_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    telemetry = recorder(tmp_path, Reducer(), progress=True)
    run(telemetry, losses())
    with telemetry.phase("evaluating"):
        telemetry.evaluation(10, {"verse": 2.5})
    telemetry.close()
    shown = capsys.readouterr().err
    assert "10/10" in shown and "200 tok/s" in shown and "verse 2.500" in shown


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_shows_the_step_and_the_time_left(
    columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    telemetry = recorder(tmp_path, Reducer(), progress=True, total_steps=100_000)
    run(telemetry, losses())
    telemetry.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    last = [line for line in re.split(r"[\r\n]", shown) if line.strip()][-1]
    assert "10/100000" in last and re.search(r"\d:\d\d:\d\d left", last) and "loss" in last, last
    assert len(last) <= columns


# Dense bf16 with fp32 accumulation from NVIDIA's data sheets (half of a figure given with sparsity), names as drivers give them.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA A10": 125e12,
    "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A10G": 70e12, "NVIDIA A40": 149.7e12, "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989.4e12, "NVIDIA H200 NVL": 835e12, "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA H20": 148e12, "NVIDIA B200": 2250e12, "NVIDIA GB200": 2450e12, "NVIDIA B300 SXM6 AC": 2250e12,
    "NVIDIA GB300": 2450e12,
    "Tesla T4": None, "NVIDIA L40": None, "NVIDIA A30": None, "NVIDIA RTX A4000": None, "NVIDIA H1000": None,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GeForce RTX 4090 D": None,
}  # fmt: skip


def test_peaks_by_the_name_a_driver_gives() -> None:
    assert {name: peak_by_name(name) for name in PEAKS} == PEAKS


@pytest.mark.slow
def test_weights_and_biases_works_without_a_network(tmp_path: Path) -> None:
    telemetry = recorder(tmp_path, Reducer(), wandb="offline")
    run(telemetry, losses())
    telemetry.close()
    assert list(tmp_path.rglob("*.wandb"))


def test_the_measured_peak_is_a_sensible_number() -> None:
    peak = peak_flops(torch.device("cpu"))
    assert peak is not None and 1e9 < peak < 1e14


def readings(snr_db: float | None, layer: int = 3) -> list[Reading]:
    return [
        Reading(
            layer=layer, linear="mlp.linear_fc1", operand=operand, format="e4m3", amax=2.0, scale=224.0, saturated=0.01,
            underflowed=0.02, snr_db=value, floor_db=20.0,
        )
        for operand, value in (("input", 31.0), ("grad", snr_db))
    ]  # fmt: skip


def test_an_operand_that_leaves_its_band_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = recorder(tmp_path, Reducer())
    for step, snr_db in enumerate((31.0, 12.0, 11.0, 30.0, 13.0, None), start=1):
        telemetry.precision(step, scaling="current", readings=readings(snr_db), policy="warn")
    telemetry.precision(7, scaling="none", readings=[], policy="warn")
    telemetry.close()
    lines = read_metrics(tmp_path / METRICS)
    measured = [line for line in lines if line["kind"] == "precision"]
    assert [line["step"] for line in measured] == [1, 2, 3, 4, 5, 6]
    assert measured[1]["readings"][1] == {
        "layer": 3, "linear": "mlp.linear_fc1", "operand": "grad", "format": "e4m3", "amax": 2.0, "scale": 224.0,
        "saturated": 0.01, "underflowed": 0.02, "snr_db": 12.0, "floor_db": 20.0,
    }  # fmt: skip
    warnings = [line["text"] for line in lines if line["kind"] == "warning"]
    assert len(warnings) == 2 and warnings[0].startswith("step 2: 1 of 2") and warnings[1].startswith("step 5")
    assert (
        "grad of layer 3 mlp.linear_fc1 at 12.0 dB (limit 20 dB), 1.000% saturated, 2.000% became zero" in warnings[0]
    )
    assert capsys.readouterr().err.count("below their lower limit") == 2

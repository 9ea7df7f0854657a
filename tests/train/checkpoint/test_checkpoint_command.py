"""`stratum checkpoint` as a user sees it: output, written files, errors. Its numbers are compared with the files, read by the
safetensors library."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from crashes import Act, acts_of_saves
from killed_runs import Run, recipe_in
from ranks import run_ranks
from safetensors.numpy import load_file

from recipes.schema import checkpoint_steps as steps
from recipes.schema import units
from recipes.schema.manifest import _digest, read_manifest
from recipes.schema.recipe import Recipe
from train.checkpoint.__main__ import main as command

_LABEL = re.compile(r"(.+)\[(.*)\]")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A run of two ranks with checkpoints of steps 4, 6 and 8 of 12, and its recipe."""
    folder = tmp_path_factory.mktemp("command")
    recipe = recipe_in(folder, steps_=12)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every_steps=2, keep_last=3))
    paused = replace(recipe, run=replace(recipe.run, stop_after_steps=8))
    assert not Run(paused, 2, folder=folder / "said").attempt(None)
    return folder, recipe


@pytest.fixture
def run(made: tuple[Path, Recipe], tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    shutil.copytree(made[0] / "killed", tmp_path / "killed")
    return tmp_path / "killed"


Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command line. -> exit status, stdout, stderr."""

    def told(*words: object) -> tuple[int, str, str]:
        status = command([str(word) for word in words])
        return status, *capsys.readouterr()

    return told


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / steps.name_of(step)


def whole_tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every tensor, assembled from the rank files by their labels."""
    tensors: dict[str, np.ndarray] = {}
    shapes = {name: record.shape for name, record in read_manifest(checkpoint).tensors.items()}
    for path in checkpoint.glob("*.safetensors"):
        for label, box in load_file(path).items():
            found = _LABEL.fullmatch(label)
            assert found is not None, label
            name, spans = found.groups()
            place = tuple(slice(*map(int, span.split(":"))) for span in spans.split(",") if span)
            tensors.setdefault(name, np.full(shapes[name], 77, box.dtype))[place] = box
    return tensors


def test_list_shows_every_checkpoint_and_marks_the_newest(run: Path, say: Say) -> None:
    status, out, err = say("list", run)
    assert (status, err) == (0, "")
    head, *rows = out.splitlines()
    assert head.split() == ["step", "tokens", "layout", "files", "size", "written", "state"]
    cells = [re.split(r" {2,}", line.strip()) for line in rows[:3]]
    assert [cell[0] for cell in cells] == ["4", "6", "8"]
    assert [cell[1] for cell in cells] == ["128", "192", "256"]  # 2 rows of 16 tokens a step
    size = sum(path.stat().st_size for path in at(run, 8).iterdir() if path.name != "manifest.json")
    assert cells[2][2:5] == ["TP1 PP1 DP2", "3", units.size(size)]
    assert [cell[6] for cell in cells] == ["whole", "whole", "whole, newest"]
    assert say("list", run / "checkpoints") == (0, out, "")
    assert "verified, newest" in say("list", run, "--verify")[1]

    (run / "checkpoints" / "latest").write_text("step_00")
    (run / "checkpoints" / ".step_00000010.writing").mkdir()
    damaged = at(run, 6) / "rank_00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    status, out, _ = say("list", run)
    assert status == 1
    assert re.search(r"^ +6 .* DAMAGED *$", out, re.M)
    assert re.search(
        r"^step 6 is damaged: rank_00001\.safetensors is 1,000 bytes long, but the manifest says [\d,]+ b", out, re.M
    )
    assert "latest says 'step_00'; the newest complete checkpoint is step_00000008" in out
    assert ".step_00000010.writing is being written or deleted" in out


def test_list_verify_reads_the_numbers(run: Path, say: Say) -> None:
    path = at(run, 8) / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert say("list", run)[0] == 0
    status, out, _ = say("list", run, "--verify")
    assert status == 1 and re.search(r"^step 8 is damaged: .*fingerprint is .* it is stored in rank_0000", out, re.M)
    status, out, _ = say("verify", run)
    assert status == 1 and out.startswith(f"DAMAGED {at(run, 8)}\n") and "fingerprint is" in out
    status, out, _ = say("verify", run, "--all")
    assert status == 1 and out.count("intact ") == 2 and out.count("DAMAGED") == 1
    assert say("verify", at(run, 4))[0] == 0


def test_show_tells_what_is_in_it(run: Path, say: Say) -> None:
    status, out, err = say("show", run)
    assert (status, err) == (0, "")
    told = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in out.splitlines()[1:13])
    assert out.splitlines()[0] == str(at(run, 8))
    assert (told["run"], told["step"], told["tokens"], told["position"]) == ("killed", "8", "256", "row 16")
    assert told["written at"] == "TP1 PP1 DP2" and told["optimizer"] == "8 updates"
    assert told["model"] == "M*-, hidden 32, vocabulary 300"
    weights = {name: values for name, values in whole_tensors(at(run, 8)).items() if name.startswith("model.")}
    count = sum(values.size for values in weights.values())
    assert re.search(rf"weights +{len(weights)} +{count:,} +F32 +{units.size(4 * count)}", out)
    assert re.search(rf"second moments +{len(weights)} +{count:,} ", out)
    _, out, _ = say("show", at(run, 4), "--tensors")
    assert re.search(r"model\.embedding\.word_embeddings\.weight +F32 +300 x 32 +[0-9a-f]{32}", out)
    body = json.loads(say("show", at(run, 4), "--json")[1])
    assert body["step"] == 4 and body["tensors"].keys() == whole_tensors(at(run, 4)).keys()


def test_diff_measures_what_differs(run: Path, say: Say) -> None:
    status, out, _ = say("diff", run, at(run, 8))
    assert status == 0 and "78 of 78 tensors are the same" in out
    status, out, _ = say("diff", at(run, 4), run, "--values", "--most", 3)
    assert status == 1 and "0 of 78 tensors are the same" in out and "... and 75 more" in out
    assert re.search(r"^tokens +128 +256 *$", out, re.M) and re.search(r"^layout +TP1 PP1 DP2 +the same *$", out, re.M)
    a, b = whole_tensors(at(run, 4)), whole_tensors(run / "checkpoints" / "step_00000008")
    changes = {
        name: np.linalg.norm(a[name].astype("f8") - b[name]) / np.linalg.norm(a[name].astype("f8"))
        for name in a
        if not name.startswith("random.")
    }
    most = sorted(changes, key=lambda name: -changes[name])[:3]
    for name in most:
        largest = np.abs(a[name].astype("f8") - b[name]).max()
        differing = (a[name] != b[name]).sum()
        cells = rf"{differing:,} of {a[name].size:,} +{largest:.3g} +{changes[name]:.3g}"
        assert re.search(rf"^{re.escape(name)} +different values +{cells} *$", out, re.M), (name, out)


def go(rank: int, recipe: Recipe, output: Path) -> None:
    from killed_runs import run_once

    run_once(rank, recipe, output)


def test_resharded_it_trains_on_as_before(made: tuple[Path, Recipe], run: Path, tmp_path: Path, say: Say) -> None:
    status, out, err = say("reshard", run, tmp_path / "three", "--files", 3)
    assert (status, err) == (0, "") and "86 tensors in 3 files" in out
    assert f"run.folder={tmp_path} run.name=three" in out
    new = at(tmp_path / "three", 8)
    sizes = [path.stat().st_size for path in sorted(new.glob("*.safetensors"))]
    assert len(sizes) == 3 and max(sizes) < 1.2 * min(sizes)
    assert say("verify", tmp_path / "three")[0] == 0 and say("diff", run, tmp_path / "three")[0] == 0
    assert say("list", tmp_path / "three")[1].count("newest") == 1

    ends = {}
    for name in ("killed", "three"):
        recipe = replace(made[1], run=replace(made[1].run, folder=str(tmp_path), name=name))
        run_ranks(2, go, recipe, tmp_path / "said")
        lines = Run(recipe, 2, folder=tmp_path / f"said_{name}").metrics
        ends[name] = {line["step"]: line["loss"] for line in lines if line["kind"] == "step" and line["step"] > 8}
    assert ends["three"] == ends["killed"] and sorted(ends["three"]) == [9, 10, 11, 12]
    assert say("diff", at(run, 12), at(tmp_path / "three", 12))[0] == 0

    assert say("reshard", run, tmp_path / "three")[0] == 2
    status, out, _ = say("reshard", at(run, 8), tmp_path / "plain" / "step_00000008", "--weights", "--ranks", 2)
    assert status == 0 and "26 tensors in 2 files" in out and "DP2" in out
    status, _, err = say("reshard", at(run, 8), tmp_path / "no", "parallel.tensor=3")
    assert status == 2 and "parallel.tensor=3 does not divide" in err and not (tmp_path / "no").exists()
    status, _, err = say("reshard", at(run, 8), tmp_path / "no", "parallel.tnsor=2")
    assert status == 2 and "'parallel.tnsor=2' is not parallel.FIELD=N" in err


def test_consolidated_it_is_one_file_any_program_reads(run: Path, tmp_path: Path, say: Say) -> None:
    status, out, _ = say("consolidate", run, tmp_path / "weights.safetensors")
    assert status == 0 and re.search(r"wrote .*weights\.safetensors, [\d.]+ KB", out)
    wanted = whole_tensors(at(run, 8))
    weights = {name.removeprefix("model."): v for name, v in wanted.items() if name.startswith("model.")}
    found = load_file(tmp_path / "weights.safetensors")
    assert found.keys() == weights.keys() and all(np.array_equal(found[name], weights[name]) for name in found)
    assert say("consolidate", run, tmp_path / "all.safetensors", "--all")[0] == 0
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in found)
    assert say("consolidate", run, tmp_path / "half.safetensors", "--dtype", "bf16")[0] == 0
    assert (tmp_path / "half.safetensors").stat().st_size < 0.55 * (tmp_path / "weights.safetensors").stat().st_size
    status, _, err = say("consolidate", run, tmp_path / "weights.safetensors")
    assert status == 2 and "already exists" in err


def killed_before(number: int, words: list[object]) -> list[Act]:
    """Run a command in a new process and SIGKILL it before disk operation `number`. -> with -1, all operations."""
    acts: list[Act] = []

    def before(act: Act) -> None:
        acts.append(act)
        if act.number == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if number < 0:
        with acts_of_saves(before):
            assert command([str(word) for word in words]) == 0
        return acts
    child = os.fork()
    if child == 0:
        with acts_of_saves(before):
            command([str(word) for word in words])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return acts


OLD = Path(__file__).with_name("version_0_1_0") / "step_00000002"


@pytest.mark.parametrize("command_", ["reshard", "reshard to a checkpoint", "consolidate"])
def test_killed_at_any_time_it_leaves_nothing_that_counts_and_is_done_by_running_it_again(
    command_: str, tmp_path: Path, say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    name = {"reshard": "run", "reshard to a checkpoint": "step_00000002", "consolidate": "w.safetensors"}[command_]
    files = ["--files", 2] if command_ != "consolidate" else []
    acts = killed_before(-1, [command_.split()[0], OLD, tmp_path / "whole" / name, *files])
    writes = [act.number for act in acts if act.name == "writev"]
    (rename,) = [act.number for act in acts if act.name == "rename" and act.target.endswith(f".{name}.writing")]
    for number in sorted(
        {1, writes[0], writes[1], writes[len(writes) // 2], writes[-1], rename - 1, rename, rename + 1}
    ):
        out = tmp_path / str(number) / name
        out.parent.mkdir(exist_ok=True)
        words = [command_.split()[0], OLD, out, *files]
        killed_before(number, words)
        assert out.exists() == (number > rename), acts[number]
        if out.exists():
            assert say(*words)[0] == 2
        else:
            assert [path.name for path in out.parent.iterdir()] == [f".{name}.writing"], acts[number]
            assert say("verify", out)[0] in (1, 2) and say("list", out.parent)[0] == 2
            caplog.clear()
            assert say(*words)[0] == 0
            assert f".{name}.writing, left by an interrupted run of this command" in caplog.text
        assert [path.name for path in out.parent.iterdir()] == [name]
        if command_ == "consolidate":
            assert out.read_bytes() == (tmp_path / "whole" / name).read_bytes()
        else:
            assert say("verify", out)[0] == 0 and say("diff", OLD, out)[0] == 0
        if command_ == "reshard":
            assert (out / "checkpoints" / "latest").read_text() == "step_00000002\n" and (out / "recipe.yaml").is_file()


def test_names_are_printed_not_obeyed(run: Path, tmp_path: Path, say: Say) -> None:
    """Markup and terminal escape codes in folder names and in a manifest."""
    odd = tmp_path / "a[bold]\x1b[2J"
    run.rename(odd)
    (odd / "checkpoints" / ".step_[bold]\x1b[2J.writing").mkdir()
    path = at(odd, 8) / "manifest.json"
    body = json.loads(path.read_text())
    body.pop("digest")
    body["lineage"] = {"from[/b]\x1b[2J": "\x1b[2J"}
    body["recipe"]["run"]["name"] = "\x1b[2J[/b]"
    path.write_text(json.dumps(body | {"digest": _digest(body)}))
    for words in (["list", odd], ["show", odd, "--tensors"], ["verify", odd, "--all"], ["diff", odd, at(odd, 4)]):
        status, out, err = say(*words)
        assert status in (0, 1) and "\x1b" not in out + err and "[bold]" in out, (words, out, err)
    status, _, err = say("reshard", odd, odd)
    assert status == 2 and "\x1b" not in err and "already exists" in err


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (lambda p: (p / "manifest.json").write_bytes(b"\x80\x04cos\nsystem\n."), "manifest.json cannot be read"),
    "nothing": (lambda p: (p / "manifest.json").write_bytes(b""), "manifest.json cannot be read"),
    "other JSON": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json is not the manifest"),
    "an altered manifest": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace('"step": 8', '"step": 9')),
        "manifest.json is damaged",
    ),
    "a short file": (lambda p: (p / "rank_00001.safetensors").write_bytes(b"x"), "rank_00001.safetensors is 1 bytes long"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_what_is_no_checkpoint_is_refused_with_file_and_reason(fault: str, run: Path, tmp_path: Path, say: Say) -> None:
    spoil, said = SPOILT[fault]
    path = at(run, 8)
    spoil(path)
    for words in (
        ["show", path], ["diff", path, at(run, 4)], ["reshard", path, tmp_path / "out"],
        ["consolidate", path, tmp_path / "out.safetensors"],
    ):  # fmt: skip
        status, out, err = say(*words)
        assert status == 2 and err.startswith("error: ") and said in err and "Traceback" not in err, (words, out, err)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()
    status, out, _ = say("verify", path)
    assert status == 1 and said in out


def test_a_damaged_index_stops_every_reader(run: Path, tmp_path: Path, say: Say) -> None:
    path = at(run, 8) / "index.json"
    text = path.read_text()
    path.write_text(text.replace("0", "1", 1) if "0" in text else text)
    for words in (["diff", "--values", run, at(run, 4)], ["consolidate", run, tmp_path / "w.safetensors"]):
        status, _, err = say(*words)
        assert status == 2 and "index.json is damaged" in err


def test_a_run_with_a_damaged_newest_says_which_it_shows(run: Path, say: Say, caplog: pytest.LogCaptureFixture) -> None:
    (at(run, 8) / "index.json").write_text("")
    status, out, _ = say("show", run)
    assert status == 0 and out.startswith(str(at(run, 6)))
    assert f"skipped: {at(run, 8) / 'index.json'} is 0 bytes long" in caplog.text


@pytest.mark.parametrize("word", ["list", "show", "verify", "consolidate"])
def test_a_place_without_checkpoints_is_named(word: str, tmp_path: Path, say: Say) -> None:
    rest = [tmp_path / "out.safetensors"] if word == "consolidate" else []
    status, _, err = say(word, tmp_path / "nothing", *rest)
    assert status == 2 and str(tmp_path / "nothing") in err and "runs/NAME" in err


def test_as_a_process_it_helps_and_refuses(run: Path) -> None:
    """`stratum checkpoint` as a real process."""
    (at(run, 8) / "manifest.json").write_bytes(b"\x80\x04.")
    words = [sys.executable, "-m", "train.checkpoint", "show", str(at(run, 8))]
    refused = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "manifest.json" in refused.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("list", "show", "verify", "diff", "reshard", "consolidate", None):
        with pytest.raises(SystemExit) as end:
            command([*([word] if word else []), "--help"])
        out = capsys.readouterr().out
        assert end.value.code == 0 and "usage: stratum checkpoint" in out
    assert all(word in out for word in ("list", "show", "verify", "diff", "reshard", "consolidate", "Exit status"))

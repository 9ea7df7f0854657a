"""Other faults of a save or a checkpoint: each is reported by name or has no effect. The table is in docs/checkpoints.md."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crashes import SMALL, Act, acts_of_saves, contents, train_on
from ranks import RankFailed, run_ranks
from tiny import engine_of, steps_of, with_fields

from recipes.schema import checkpoint_steps as steps
from recipes.schema.errors import CheckpointError
from recipes.schema.recipe import Recipe
from train.checkpoint import fingerprint, offline, publishing
from train.checkpoint.__main__ import main as command
from train.checkpoint.files import Piece, Reader
from train.checkpoint.manager import CheckpointFolder
from train.checkpoint.manifest import Manifest, RunState, read_manifest
from train.checkpoint.publishing import point_at
from train.checkpoint.saving import Snapshot
from train.checkpoint.stale import MIN_ELEMENTS

OLD, NEW = 2, 4
MUON = {"optim.kind": "muon"}


@pytest.fixture
def folder(pair: Path, tmp_path: Path) -> Path:
    shutil.copytree(pair, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def swap_files(new: Path) -> None:
    a, b = new / "rank_00000.safetensors", new / "rank_00001.safetensors"
    a.rename(new / "x")
    b.rename(a)
    (new / "x").rename(b)


def shard_of_old(new: Path) -> None:
    name = "rank_00001.safetensors"
    old = (new.parent / steps.name_of(OLD) / name).read_bytes()
    assert len(old) == (new / name).stat().st_size
    (new / name).write_bytes(old)


def zeroed(new: Path) -> None:
    reader = Reader(new)
    (place, *_) = reader.index["optimizer.exp_avg.output_layer.weight"]
    path = new / place.file
    content = bytearray(path.read_bytes())
    size = 4 * place.shape[0] * place.shape[1]
    content[place.start : place.start + size] = bytes(size)
    path.write_bytes(content)


def cut(path: Path, length: int) -> None:
    with path.open("rb+") as stream:
        stream.truncate(length)


def future(new: Path) -> None:
    path = new / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "tensors truncated": lambda new: cut(new / "rank_00001.safetensors", 1000),
    "tensors of zero length": lambda new: cut(new / "rank_00000.safetensors", 0),
    "tensors missing": lambda new: (new / "rank_00000.safetensors").unlink(),
    "byte of the numbers flipped": lambda new: flip(new / "rank_00001.safetensors", 0.9),
    "byte of index.json flipped": lambda new: flip(new / "index.json", 0.5),
    "byte of manifest.json flipped": lambda new: flip(new / "manifest.json", 0.5),
    "manifest.json empty": lambda new: cut(new / "manifest.json", 0),
    "shards of two ranks swapped": swap_files,
    "shard of the step before": shard_of_old,
    "tensor zeroed on disk": zeroed,
    "future format": future,
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_named_and_training_falls_back(fault: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = folder / steps.name_of(NEW)
    DAMAGE[fault](new)
    assert command(["verify", str(new)]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    ((begin, notes),) = run_ranks(1, train_on, 1, folder, OLD)
    assert begin == OLD and steps.name_of(NEW) in notes


def test_a_flipped_byte_in_a_header_is_survived_and_found_by_verify(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Readers use index.json, so training continues from verified data; `verify` reports the file."""
    new = folder / steps.name_of(NEW)
    flip(new / "rank_00000.safetensors", 0.01)
    assert command(["verify", str(new)]) == 1 and "header" in capsys.readouterr().out
    assert run_ranks(1, train_on, 1, folder, NEW)[0] == (NEW, "")


@pytest.mark.parametrize("pointer", ["", "step_0000", "step_00000099\n", "\x00\xff", None])
def test_a_torn_pointer_is_reported_and_loses_nothing(pointer: str | None, folder: Path) -> None:
    path = folder / "latest"
    path.unlink()
    if pointer is not None:
        path.write_text(pointer)
    good, (note,) = steps.candidates(folder)
    assert [manifest.step for _, manifest in good] == [NEW, OLD]
    assert str(path) in note and steps.name_of(NEW) in note


def test_a_pointer_without_its_checkpoint_is_no_fresh_start(tmp_path: Path) -> None:
    point_at(tmp_path, "step_00000010")
    with pytest.raises(CheckpointError, match="the checkpoint it names does not"):
        steps.newest_in(tmp_path)


class Refuse:
    """One disk operation of the save of step NEW fails, once or always."""

    def __init__(self, code: int, name: str, target: str, *, times: int = 99) -> None:
        self.code, self.name, self.target, self.times = code, name, target, times

    def __call__(self, rank: int, act: Act) -> None:
        if act.name == self.name and self.target in act.target and f"step_{NEW:08d}" in act.target and self.times:
            self.times -= 1
            raise OSError(self.code, os.strerror(self.code), act.target)


REFUSALS = {
    "disk full": Refuse(errno.ENOSPC, "writev", "rank_00001"),
    "disk full at the manifest": Refuse(errno.ENOSPC, "writev", "manifest.json"),
    "I/O error while syncing": Refuse(errno.EIO, "fsync", "rank_00000"),
    "read-only folder": Refuse(errno.EROFS, "mkdir", ".writing"),
    "quota at the rename": Refuse(errno.EDQUOT, "rename", ".writing"),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_errors_of_the_system_are_raised_on_every_rank_and_lose_nothing(fault: str, pair: Path, tmp_path: Path) -> None:
    refusal = REFUSALS[fault]
    shutil.copytree(pair / steps.name_of(OLD), tmp_path / steps.name_of(OLD))
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, train_on, 2, tmp_path, NEW, SMALL, refusal)
    text = str(caught.value)
    assert text.count("CheckpointError") >= 2 and os.strerror(refusal.code) in text and "earlier checkpoints" in text
    assert contents(tmp_path) == {OLD: contents(pair)[OLD]}
    assert not list(tmp_path.glob(".*"))


def test_a_save_that_fails_once_is_tried_again_from_the_same_copy(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / steps.name_of(OLD), tmp_path / steps.name_of(OLD))
    patient = replace(SMALL, checkpoint=replace(SMALL.checkpoint, retries=1, retry_wait_s=0.01))
    once = Refuse(errno.EIO, "writev", "rank_00001", times=1)
    run_ranks(2, train_on, 2, tmp_path, NEW, patient, once)
    assert contents(tmp_path)[NEW] == contents(pair)[NEW]


def lenient_run(rank: int, folder: Path) -> list[tuple[str, int]]:
    """Every save of step 2 fails; the run continues, and step 4 is saved."""
    recipe = replace(SMALL, checkpoint=replace(SMALL.checkpoint, on_failure="continue"))
    told = []

    def refuse(act: Act) -> None:
        if f"step_{OLD:08d}" in act.target and act.name == "writev":
            raise OSError(errno.ENOSPC, "No space left on device")

    with engine_of(recipe, rank=rank, world=1) as engine, acts_of_saves(refuse):
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        for step in range(NEW):
            steps_of(engine, recipe, range(step, step + 1), before_update=checkpoints.before_update)
            if checkpoints.is_due(step + 1):
                checkpoints.request(engine, RunState(step=step + 1, position=0, data_hash="h"))
            checkpoints.wait()
            checkpoints.check()
            told += [(event.kind, event.step) for event in checkpoints.collect()]
    return told


def test_a_lenient_run_outlives_a_failed_save(tmp_path: Path) -> None:
    told = run_ranks(1, lenient_run, tmp_path)[0]
    assert told == [
        ("save_requested", 2), ("save_staged", 2), ("save_failed", 2),
        ("save_requested", 4), ("save_staged", 4), ("save", 4),
    ]  # fmt: skip
    assert list(contents(tmp_path)) == [NEW]


def write_past_a_limit(rank: int, folder: Path) -> str:
    """A real limit of the system: files may not grow beyond 16 KiB."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
    with engine_of(SMALL, rank=rank, world=1) as engine:
        try:
            CheckpointFolder(folder, SMALL.checkpoint).save(engine, RunState(step=1, position=0, data_hash="h"))
        except CheckpointError as error:
            return str(error)
    return "nothing"


def test_a_nearly_full_disk_is_reported_with_distinct_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    piece = Piece("model.a", (1000,), (0,), (1000,), torch.zeros(1000))
    snapshot = Snapshot(Manifest(layout={"world": 1}), [piece])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3990))
    with pytest.raises(CheckpointError, match=r"about 4,000 bytes needed, 3,990 free, 10 too few"):
        CheckpointFolder(tmp_path, SMALL.checkpoint)._make_room(1, snapshot)


def test_a_real_limit_of_the_system_is_reported(tmp_path: Path) -> None:
    text = run_ranks(1, write_past_a_limit, tmp_path)[0]
    assert "cannot be written: File too large" in text
    assert not list(tmp_path.glob("step_*")) and not list(tmp_path.glob(".*"))


def spoil_and_save(rank: int, folder: Path, spoil: str) -> str:
    """Save, train, corrupt the tensors in memory, save again. -> the second save's error."""
    recipe, spoil = (with_fields(SMALL, MUON), spoil.removesuffix(", Muon")) if "Muon" in spoil else (SMALL, spoil)
    with engine_of(recipe, rank=rank, world=1) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        steps_of(engine, recipe, range(1))
        checkpoints.save(engine, RunState(step=1, position=4, data_hash="h"))
        named = engine.chunks[0].module.named_parameters()
        end = "linear_fc1.weight" if recipe is not SMALL else "embeddings.weight"
        weight = next(p for name, p in named if p.numel() >= MIN_ELEMENTS and name.endswith(end))
        before = weight.detach().clone()
        steps_of(engine, recipe, range(1, 2))
        moments = [engine.optimizer.chained_optimizers[0].optimizer.state[p] for p in _mains(engine, weight)]
        match spoil:
            case "weight frozen":
                weight.data.copy_(before)
            case "weight zeroed":
                weight.data.zero_()
            case "moment zeroed":
                moments[0]["exp_avg"].zero_()
            case "buffer of the save before":
                stale_copy(checkpoints)
        try:
            checkpoints.request(engine, RunState(step=2, position=8, data_hash="h"))
            checkpoints.wait()
            checkpoints.check()
        except CheckpointError as error:
            return str(error)
        return "saved"


def _mains(engine: Any, weight: torch.Tensor) -> list[torch.Tensor]:
    part = engine.optimizer.chained_optimizers[0]
    group, order = part.model_param_group_index_map[weight]
    return [part.optimizer.param_groups[group]["params"][order]]


def stale_copy(checkpoints: CheckpointFolder) -> None:
    """The copy for the background is not refreshed, as if its buffer were the last save's."""
    real = fingerprint.of_box

    def without_copying(data: torch.Tensor, *, copy_to: int | None = None, **box: Any) -> fingerprint.Sums:
        return real(data, copy_to=None, **box)

    fingerprint.of_box = without_copying
    checkpoints._staging.of_size(1 << 20, torch.device("cpu")).zero_()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("weight frozen", "the fp32 weight did not change"),
        ("weight zeroed", "was not zero at the last save and is all zero now"),
        ("moment zeroed", "exp_avg was not zero at the last save"),
        ("buffer of the save before", "differs from the model"),
        ("weight frozen, Muon", "the fp32 weight did not change"),
        ("moment zeroed, Muon", "exp_avg was not zero at the last save"),
        ("nothing", "saved"),
        ("nothing, Muon", "saved"),
    ],
)
def test_what_training_did_not_leave_is_refused(spoil: str, said: str, tmp_path: Path) -> None:
    text = run_ranks(1, spoil_and_save, tmp_path, spoil)[0]
    assert said in text
    assert (tmp_path / steps.name_of(2)).exists() == spoil.startswith("nothing")
    assert read_manifest(tmp_path / steps.name_of(1)).step == 1


def train_with_no_learning_rate(rank: int, folder: Path, recipe: Recipe) -> None:
    from tiny import microbatches

    from train.record.stopwatch import Stopwatch
    from train.step import train_step

    with engine_of(recipe, rank=rank, world=1) as engine:
        checkpoints = CheckpointFolder(folder, recipe.checkpoint)
        for step in range(2):
            rows = microbatches(recipe, engine.mesh, step)
            train_step(engine, rows, step=step, learning_rate=0.0, watch=Stopwatch())
            checkpoints.save(engine, RunState(step=step + 1, position=0, data_hash="h"))


@pytest.mark.parametrize("optimizer", [{}, MUON], ids=["AdamW", "Muon"])
def test_weights_that_rightly_stand_still_are_saved(optimizer: dict[str, str], tmp_path: Path) -> None:
    """A learning rate of zero (the first step of a warm-up): weights stay, moments move."""
    run_ranks(1, train_with_no_learning_rate, tmp_path, with_fields(SMALL, optimizer))
    one, two = contents(tmp_path)[1], contents(tmp_path)[2]
    assert all(one[name] == two[name] for name in one if name.startswith("model."))
    assert all(one[name] != two[name] for name in one if name.startswith("optimizer.exp_avg."))


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "a path out of the folder": lambda m: m["files"].update({"../../etc/passwd": 1}),
    "an unknown format": lambda m: next(iter(m["tensors"].values())).update(dtype="PICKLE"),
    "a negative size": lambda m: next(iter(m["tensors"].values())).update(shape=[-1, 2]),
    "a huge size": lambda m: next(iter(m["tensors"].values())).update(shape=[1 << 60, 1 << 60]),
    "forty dimensions": lambda m: next(iter(m["tensors"].values())).update(shape=[1] * 40),
    "true for a size": lambda m: next(iter(m["tensors"].values())).update(shape=[True]),
    "a fingerprint with a sign": lambda m: next(iter(m["tensors"].values())).update(fingerprint="+" + 31 * "1"),
    "a name that moves the cursor": lambda m: m["tensors"].update({"model.\x1b[2J": next(iter(m["tensors"].values()))}),
    "a file name too long for the system": lambda m: m["files"].update({300 * "x": 1}),
    "a degree that is none": lambda m: m["layout"].update(tensor="two"),
    "a degree of infinity": lambda m: m["layout"].update(tensor=float("inf")),
    "a recipe that is none": lambda m: m["recipe"].update(run=5),
    "a teacher that is none": lambda m: m.update(lineage={"teacher": "me"}),
    "a teacher without weights": lambda m: m.update(lineage={"teacher": {"checkpoint": "here"}}),
    "a hash that is none": lambda m: m.update(data_hash=5),
    "updates below zero": lambda m: m.update(updates=-1),
    "a step that is none": lambda m: m.update(step="rm -rf"),
    "no step": lambda m: m.pop("step"),
    "no recipe": lambda m: m.pop("recipe"),
    "fields from elsewhere": lambda m: m.update(__class__="os.system"),
}


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_hostile_manifest_is_refused_by_name(trick: str, folder: Path) -> None:
    """Its digest is right, because an attacker can compute it."""
    from recipes.schema.manifest import _digest

    path = folder / steps.name_of(NEW) / "manifest.json"
    body = json.loads(path.read_text())
    body.pop("digest")
    HOSTILE[trick](body)
    path.write_text(json.dumps(body | {"digest": _digest(body)}))
    with pytest.raises(CheckpointError, match=r"manifest\.json|passwd|elements"):
        Reader(path.parent)


def change_index(new: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change index.json and correct every digest."""
    from recipes.schema.manifest import _digest, sha256

    body = json.loads((new / "manifest.json").read_text())
    index = json.loads((new / "index.json").read_text())
    body.pop("digest")
    change(index)
    text = json.dumps(index)
    (new / "index.json").write_text(text)
    body["files"]["index.json"] = len(text)
    body["index_sha256"] = sha256(text)
    (new / "manifest.json").write_text(json.dumps(body | {"digest": _digest(body)}))


WEIGHT = "model.output_layer.weight"
HOSTILE_INDEX: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a file that is none of its own": (lambda i: i["files"].__setitem__(0, "/etc/passwd"), "is not a file of this"),
    "a file number there is not": (lambda i: i["pieces"][WEIGHT][0].__setitem__(0, 99), "does not describe the files"),
    "a place before the file": (lambda i: i["pieces"][WEIGHT][0].__setitem__(1, -8), "impossible numbers"),
    "a place behind the file": (lambda i: i["pieces"][WEIGHT][0].__setitem__(1, 1 << 50), "reaches outside rank_0000"),
    "a box outside its tensor": (lambda i: i["pieces"][WEIGHT][0].__setitem__(2, [10**6, 0]), "outside its tensor"),
    "words for numbers": (lambda i: i["pieces"][WEIGHT][0].__setitem__(1, "0"), "does not describe the files"),
    "a part left out": (lambda i: i["pieces"][WEIGHT].pop(), "its parts"),
    "a tensor left out": (lambda i: i["pieces"].pop(WEIGHT), "its parts 0"),
    "the place of another tensor": (
        lambda i: i["pieces"].__setitem__(WEIGHT, i["pieces"]["optimizer.exp_avg.output_layer.weight"]),
        f"{WEIGHT}: its fingerprint is",
    ),
}


@pytest.mark.parametrize("trick", HOSTILE_INDEX)
def test_a_hostile_index_is_refused_by_name(trick: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = HOSTILE_INDEX[trick]
    new = folder / steps.name_of(NEW)
    change_index(new, change)
    assert command(["verify", str(new)]) == 1
    out = capsys.readouterr().out
    assert said in out and ("index.json" in out or "fingerprint" in out), out


@pytest.mark.parametrize(
    "content", [b"\x80\x04cos\nsystem\n(S'true'\ntR.", b"[" * 100_000, b"{}", b"\xff\xfe", b"null"]
)
def test_files_that_are_something_else_are_refused(content: bytes, folder: Path) -> None:
    for name in ("manifest.json", "index.json"):
        path = folder / steps.name_of(NEW) / name
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            Reader(path.parent)
        path.write_bytes(kept)
    assert offline.verify(folder / steps.name_of(NEW), lambda _: None) == []


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "rank_00000.safetensors"])
def test_what_would_hold_a_reader_for_ever_is_no_file(name: str, folder: Path) -> None:
    """A pipe nobody writes to, a device without end, a link to itself."""
    path = folder / steps.name_of(NEW) / name
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        path.unlink()
        put(path)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            Reader(path.parent)
        (note,) = steps.candidates(folder)[1][:1]
        assert name in note and note.startswith(steps.SKIPPED)


def test_names_that_look_like_steps(folder: Path) -> None:
    """A name in digits of other scripts is not a step; a folder whose step differs from its name is skipped and reported."""
    for name in ("step_²", "step_٣", "step_" + "9" * 60, "step_4b"):
        (folder / name).mkdir()
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("/dev/zero")
    shutil.copytree(folder / steps.name_of(OLD), folder / steps.name_of(9))
    good, (note, pointer) = steps.candidates(folder)
    assert [manifest.step for _, manifest in good] == [NEW, OLD]
    assert (
        f"contains step {OLD}, not the step in its name. If it belongs to this run, rename it to {steps.name_of(OLD)}"
        in note
    )
    assert "cannot be read: it is a device, not a regular file" in pointer


def test_of_a_linked_checkpoint_only_the_link_is_deleted(folder: Path, tmp_path: Path) -> None:
    """A step on another disk, with a link in the run's folder."""
    elsewhere = tmp_path / "elsewhere"
    link = folder / steps.name_of(OLD)
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    before = contents(folder)
    assert sorted(before) == [OLD, NEW] and offline.verify(link, lambda _: None) == []
    publishing.delete(link)
    assert list(contents(folder)) == [NEW] and not list(folder.glob(".*"))
    assert offline.verify(elsewhere, lambda _: None) == []


def test_pieces_know_their_name() -> None:
    piece = Piece("model.a", (4, 6), (1, 2), (2, 3), torch.arange(6.0))
    assert piece.label == "model.a[1:3,2:5]"


def test_prepared_data_is_not_called_a_damaged_checkpoint(tmp_path: Path) -> None:
    """The advice for a damaged checkpoint is to remove its folder."""
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "sources": {}, "tokenizer": {}}))
    with pytest.raises(CheckpointError, match="has prepared data, not a checkpoint") as caught:
        read_manifest(tmp_path)
    assert "Remove" not in str(caught.value)

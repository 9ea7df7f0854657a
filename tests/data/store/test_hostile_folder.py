"""Untrusted folders of prepared data: files outside of the folder are never read or written, and sizes are limited."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from shards import random_documents, write_folder

from data.dataset import open_dataset
from data.store.cache import Activity, RemoteFolder
from data.store.manifest import FileFacts, read_manifest
from recipes.schema.data import CacheConfig, DataConfig, SourceConfig
from recipes.schema.errors import DataError


@pytest.fixture
def served(tmp_path: Path) -> Path:
    documents = random_documents(80, seed=1)
    write_folder(tmp_path / "far" / "set", {"a": [documents]})
    return tmp_path / "far" / "set"


def config_of(served: Path) -> DataConfig:
    return DataConfig(
        folder=f"file://{served}",
        sources={"a": SourceConfig(path="-")},
        row_tokens=16,
        shuffle_shards=1,
        cache=CacheConfig(folder=str(served.parent.parent / "home" / "cache"), retries=0),
    )


def change(served: Path, do: Any) -> None:
    path = served / "manifest.json"
    content = json.loads(path.read_text())
    do(content)
    path.write_text(json.dumps(content))


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["../../victim", "/ABSOLUTE", "..", "", "manifest.json", "a/b", "x\n", "\x1b[2J", 7])
def test_a_tokenizers_name_cannot_overwrite_files_elsewhere(name: Any, served: Path) -> None:
    home = served.parent.parent / "home"
    home.mkdir()
    victim = home / "victim"
    victim.write_text("mine")
    (served.parent.parent / "far" / "victim").write_text("theirs")
    name = str(victim) if name == "/ABSOLUTE" else name
    change(served, lambda content: content["tokenizer"].update(file=name))
    with pytest.raises(DataError, match=r"tokenizer\.file=") as caught:
        open_dataset(config_of(served))
    assert victim.read_text() == "mine" and "\x1b" not in str(caught.value)
    assert {name for name in files_in(home) if not name.startswith("cache/")} == {"victim"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "../../victim"},
        {"path": "a//b"},
        {"path": "."},
        {"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"bin": {"bytes": 1, "sha256": "../../../../x"}}},
        {"files": {"bin": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"bin": {"bytes": True, "sha256": "0" * 64}}},
        {"tokens": "many"},
        {"dtype": "object"},
    ],
)
def test_a_shards_name_and_digest_cannot_name_another_folder(wrong: dict[str, Any], served: Path) -> None:
    change(served, lambda content: content["sources"]["a"]["splits"]["train"][0].update(wrong))
    with pytest.raises(DataError, match="cannot be read as a data manifest"):
        open_dataset(config_of(served))
    with pytest.raises(DataError, match="cannot be read as a data manifest"):
        read_manifest(served)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 2}', b"null"])
def test_a_file_that_is_not_a_manifest_is_one_message(content: bytes, served: Path) -> None:
    (served / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as a data manifest"):
        open_dataset(config_of(served))


def test_copies_stay_inside_the_cache_and_are_bounded_and_proven(served: Path, tmp_path: Path) -> None:
    cache = CacheConfig(folder=str(tmp_path / "cache"), retries=0)
    remote = RemoteFolder(f"file://{served}", cache, Activity())
    with pytest.raises(DataError, match=r"outside data\.cache\.folder"):
        remote.local("../../../x")
    with pytest.raises(DataError, match=r"outside data\.cache\.folder"):
        remote.local("x", FileFacts(1, "../../../../../.."))
    name = read_manifest(served).tokenizer.file
    with pytest.raises(DataError, match="larger than 3 bytes"):
        remote.local(name, most_bytes=3)
    with pytest.raises(DataError, match="checksum"):
        remote.local(name, sha256="0" * 64)
    assert not (remote.folder / name).exists()
    copy = remote.local(name)
    copy.unlink()
    (tmp_path / "victim").write_text("mine")
    copy.symlink_to(tmp_path / "victim")
    aside = f"{copy.name}.fetching-{os.uname().nodename}-{os.getpid()}"
    copy.with_name(aside).symlink_to(tmp_path / "victim")
    assert remote.local(name).read_bytes() == (served / name).read_bytes()
    assert (tmp_path / "victim").read_text() == "mine" and not copy.is_symlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in remote.folder.iterdir():
        path.unlink()
    remote.folder.rmdir()
    remote.folder.symlink_to(outside)
    with pytest.raises(DataError, match=r"outside data\.cache\.folder"):
        remote.local(name)
    assert not list(outside.iterdir())

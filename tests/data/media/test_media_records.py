"""Media from files to batches: every form of record, the same whatever the container, and every bad record named."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from media_files import (
    audio_bytes,
    grey_video,
    image_bytes,
    media_config,
    media_tokenizer,
    pixels,
    tone,
    write_jsonl,
    write_tar,
)
from rich.console import Console

import data.media.decode as decode
from data.batch import Batch
from data.dataset import Dataset, open_dataset
from data.inspect import draw_media
from data.media.audio import log_mel, open_audio
from data.media.encode import MediaEncoder
from data.media.images import open_image, patches_of
from data.media.items import AUDIO
from data.media.record import folder_fetch, media_of
from data.prepare import prepare
from data.stream import Stream
from data.tokenizer import load_tokenizer
from data.trace import pieces_of
from recipes.schema.data import DataConfig, MediaConfig, SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError

QUIET = Console(quiet=True)
ROW = 160
COUNT = 24


def text(number: int) -> str:
    return f"This is number {number}, drawn and spoken."


def picture(number: int) -> bytes:
    return image_bytes(pixels(number, 20 + 3 * number, 70 - 2 * number))


def sound(number: int) -> bytes:
    return audio_bytes(tone(0.2 + number / 50, hertz=300 + number))


def base(content: bytes) -> str:
    return base64.b64encode(content).decode()


def made_of(config: DataConfig) -> Dataset:
    prepare(config, console=QUIET)
    return open_dataset(config)


def every(dataset: Dataset) -> Batch:
    return dataset.training_rows(np.arange(dataset.train[0].count))


def facts(dataset: Dataset) -> list[Any]:
    """What a batch of all rows has, but for the names of files."""
    batch = every(dataset)
    assert batch.media is not None and batch.learned is not None
    return [batch.labels, batch.learned, *vars(batch.media).values()]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Text, image by path, audio in bytes, and every fifth a video first, in one jsonl."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "pictures").mkdir()
    (folder / "clip.mp4").write_bytes(grey_video(range(0, 200, 20)))
    records = []
    for number in range(COUNT):
        (folder / "pictures" / f"{number}.png").write_bytes(picture(number))
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": text(number)},
            {"type": "image", "path": f"pictures/{number}.png"},
            {"type": "text", "text": " It sounds "},
            {"type": "input_audio", "input_audio": {"data": base(sound(number)), "format": "wav"}},
        ]
        records.append({"content": [{"type": "video", "video": "clip.mp4"}, *parts] if number % 5 == 0 else parts})
    config = media_config(folder, write_jsonl(folder / "records.jsonl", records), row_tokens=ROW)
    prepare(config, console=QUIET)
    return config


def test_placeholders_stand_where_media_are_spliced_and_only_text_is_learned(made: DataConfig) -> None:
    dataset = open_dataset(made)
    batch = every(dataset)
    media, special = batch.media, dataset.tokenizer.special
    assert media is not None and batch.learned is not None
    marked = np.zeros(batch.tokens.shape, dtype=bool)
    for row, slot, (rows, columns) in zip(media.image_rows, media.image_slots, media.grids, strict=True):
        assert (batch.tokens[row, slot : slot + rows * columns] == special["<|image|>"]).all()
        marked[row, slot : slot + rows * columns] = True
    for row, slot, frames in zip(media.clip_rows, media.clip_slots, media.clip_frames, strict=True):
        count = -(-int(frames) // made.media.audio_stride)
        assert (batch.tokens[row, slot : slot + count] == special["<|audio|>"]).all()
        marked[row, slot : slot + count] = True
    held = np.isin(batch.tokens.numpy(), [special["<|image|>"], special["<|audio|>"]])
    assert (held == marked).all() and len(media.patches) == int(media.grids.prod(dim=1).sum())
    learned, labels = batch.learned.numpy(), batch.labels.numpy()
    assert not np.isin(labels[learned], [special["<|image|>"], special["<|audio|>"]]).any()
    said = dataset.tokenizer.decode(labels[learned].tolist())
    assert "seconds>" not in said and said.count(" It sounds ") == dataset.train[0].stream.documents


def test_patches_and_mels_are_those_of_the_record(made: DataConfig) -> None:

    dataset = open_dataset(made)
    rows, media = dataset.train[0], every(dataset).media
    assert media is not None and rows.media is not None
    numbers = [dataset.origin(rows.stream, document).record for document in range(rows.stream.documents)]
    found = [rows.media.decoded_items(document) for document in range(rows.stream.documents)]
    for number, items in zip(numbers, found, strict=True):
        image, clip = items[-2:]
        wanted = open_image(picture(number), most_pixels=10**6)
        assert (image.values == patches_of(wanted, (image.item.rows, image.item.columns), patch=4)).all()
        assert (clip.values == log_mel(open_audio(sound(number), most_seconds=30), mels=80)).all()
        levels = [items[place].values.mean() for place in range(len(items) - 2)]
        assert np.allclose(levels, [0, 60, 120, 180] if number % 5 == 0 else [], atol=4)
    shown = [dataset.locate(position).pieces for position in range(rows.count)]
    documents = [rows.stream.document_at(piece.start) for pieces in shown for piece in pieces]
    order = np.concatenate([one.values for document in documents for one in found[document] if one.item.kind != AUDIO])
    assert (media.patches.numpy() == order).all()


def test_a_video_has_its_times_as_text(made: DataConfig) -> None:
    dataset = open_dataset(made)
    rows = dataset.train[0]
    document = next(d for d in range(rows.stream.documents) if dataset.origin(rows.stream, d).record % 5 == 0)
    start, stop = rows.stream.document_span(document)
    shown = dataset.tokenizer.decode_all(rows.read_labels(start, stop - start).tolist())
    frame = "<|image|>" * 6
    assert shown.startswith("".join(f"<{time} seconds>{frame}" for time in ("0.0", "0.3", "0.6", "0.9")))


def test_media_follow_their_rows_into_microbatches_at_any_number_of_ranks(made: DataConfig) -> None:
    dataset = open_dataset(made)
    whole = dataset.training_rows(np.arange(8))
    assert whole.media is not None
    alone = [dataset.training_rows(np.array([position])) for position in range(8)]
    for position, one in enumerate(alone):
        part, picked = whole.part(position, position + 1), whole.select(np.array([position]))
        for batch in (part, picked):
            assert same([*vars(batch.media).values()], [*vars(one.media).values()])
    twice = whole.select(np.array([3, 3])).media
    assert twice is not None and len(twice.patches) == 2 * len(alone[3].media.patches)
    for ranks in (1, 2, 4):
        found: dict[int, Batch] = {}
        for rank in range(ranks):
            options = {"global_rows": 4, "microbatch_rows": 1, "rank": rank, "ranks": ranks, "prefetch_steps": 1}
            with Stream(dataset, position=4, **options) as stream:
                found |= {int(batch.positions[0]): batch for batch in next(stream)}
        for position in range(4, 8):
            assert same([*vars(found[position].media).values()], [*vars(alone[position].media).values()])


def test_trace_and_inspect_show_media(made: DataConfig, tmp_path: Path) -> None:
    dataset = open_dataset(made)
    pieces = list(pieces_of(dataset, dataset.locate(0), chars=20))
    assert all([m.kind for m in piece.media][-2:] == ["image", "audio"] for piece in pieces)
    labels = dataset.training_rows(np.array([0])).labels[0]
    for medium in (m for piece in pieces for m in piece.media):
        name = "<|audio|>" if medium.kind == "audio" else "<|image|>"
        assert (labels[medium.slot : medium.slot + medium.tokens] == dataset.tokenizer.special[name]).all()
    drawn = draw_media(dataset, tmp_path / "media.png", documents=2)
    assert drawn >= 4 and (tmp_path / "media.png").stat().st_size > 1_000


def caption(folder: Path, form: str) -> DataConfig:
    """The same records, an image and its text each, in one of the forms."""
    some = [(picture(number), text(number)) for number in range(COUNT)]
    path = folder / f"{form}.jsonl"
    source: dict[str, Any] = {}
    match form:
        case "paths":
            for number, (content, _) in enumerate(some):
                (folder / f"{number}.png").write_bytes(content)
            write_jsonl(path, [{"image": f"{n}.png", "text": words} for n, (_, words) in enumerate(some)])
        case "data urls":
            url = "data:image/png;base64,"
            write_jsonl(
                path,
                [
                    {
                        "content": [
                            {"type": "image_url", "image_url": {"url": url + base(c)}},
                            {"type": "text", "text": t},
                        ]
                    }
                    for c, t in some
                ],
            )
        case "placeholders":
            write_jsonl(path, [{"text": f"<image>{words}", "images": [{"bytes": base(c)}]} for c, words in some])
        case "parts and a list":
            write_jsonl(
                path,
                [
                    {"content": [{"type": "image"}, {"type": "text", "text": t}], "images": [{"base64": base(c)}]}
                    for c, t in some
                ],
            )
        case "obelics":
            write_jsonl(path, [{"texts": [None, words], "images": [{"bytes": base(c)}, None]} for c, words in some])
        case "parquet":
            path = folder / "some.parquet"
            images = [{"bytes": content, "path": None} for content, _ in some]
            pyarrow.parquet.write_table(pa.table({"image": images, "text": [words for _, words in some]}), path)
        case "webdataset":
            members = [
                m for n, (c, t) in enumerate(some) for m in ((f"a/{n:03}.txt", t.encode()), (f"a/{n:03}.png", c))
            ]
            path = write_tar(folder / "some.tar", [*members, ("a/readme.md", b"not read")])
        case "webdataset with json":
            members = []
            for n, (content, words) in enumerate(some):
                parts = [{"type": "image", "path": f"{n:03}.png"}, {"type": "text", "text": words}]
                members += [(f"{n:03}.png", content), (f"{n:03}.json", json.dumps({"content": parts}).encode())]
            path = write_tar(folder / "some.tar", members)
        case "set":
            path = folder / "set"
            features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
            rows = {"image": [{"bytes": c, "path": None} for c, _ in some], "text": [t for _, t in some]}
            datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return media_config(folder / form, path, row_tokens=ROW, **source)


FORMS = ("paths", "data urls", "placeholders", "parts and a list", "obelics", "parquet", "webdataset",
         "webdataset with json", "set")  # fmt: skip


def test_every_form_of_record_gives_the_same_rows(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    wanted = facts(made_of(caption(tmp_path, FORMS[0])))
    assert len(wanted[2]) > 100
    for form in FORMS[1:]:
        assert same(facts(made_of(caption(tmp_path, form))), wanted), form


def test_equal_media_are_stored_once(tmp_path: Path) -> None:
    records = [{"image": {"bytes": base(picture(number % 2))}, "text": text(number)} for number in range(COUNT)]
    dataset = made_of(media_config(tmp_path, write_jsonl(tmp_path / "a.jsonl", records), row_tokens=ROW))
    counts = dataset.manifest.sources["media"].description["media"]
    assert counts["train"]["files"] == 2 and counts["train"]["images"] + counts["heldout"]["images"] == COUNT
    assert counts["train"]["media_bytes"] == len(picture(0)) + len(picture(1))


GOOD = [{"image": {"bytes": base(picture(number))}, "text": text(number)} for number in range(COUNT)]
BAD: dict[str, tuple[Any, str]] = {
    "truncated jpeg": ({"image": {"bytes": base(image_bytes(pixels(1, 99, 99), "JPEG")[:2_000])}, "text": "a"}, "truncated"),
    "missing file": ({"image": "nowhere.png", "text": "a"}, "part 1 .image. nowhere.png cannot be read: No such file"),
    "http": ({"image": "https://example.org/a.png", "text": "a"}, "nothing is downloaded"),
    "file url": ({"image": {"url": "file:///etc/passwd"}, "text": "a"}, "nothing is downloaded"),
    "path above": ({"image": "../a.png", "text": "a"}, "leads out of the folder"),
    "absolute path": ({"image": "/etc/hostname", "text": "a"}, "leads out of the folder"),
    "link outside": ({"image": "link.png", "text": "a"}, "link that leads out of the folder"),
    "a folder": ({"image": ".", "text": "a"}, "cannot be read"),
    "too many placeholders": ({"text": "<image> <image>", "images": [GOOD[0]["image"]]}, "2 placeholders for images, but 1"),
    "too few placeholders": ({"text": "no place", "images": [GOOD[0]["image"]]}, "0 placeholders for images, but 1"),
    "part without medium": ({"content": [{"type": "audio"}]}, "1 placeholder for audios, but 0"),
    "not base64": ({"image": {"bytes": "%%%"}, "text": "a"}, "not base64"),
    "no bytes": ({"image": {"bytes": ""}, "text": "a"}, "0 bytes"),
    "unknown part": ({"content": [{"type": "hologram"}]}, "part 1 is of type 'hologram'"),
    "decoded audio": ({"content": [{"type": "audio", "audio": {"array": [0.1]}}]}, "Store audio files"),
    "an image as audio": ({"audio": GOOD[0]["image"], "text": "a"}, "part 1 .audio. that cannot be decoded as audio"),
    "lists of different lengths": ({"texts": ["a"], "images": [None, GOOD[0]["image"]]}, "different lengths"),
    "no parts": ({"other": 1}, "has no parts"),
}  # fmt: skip


def test_every_bad_record_is_named_or_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("/etc/hostname")
    path = tmp_path / "a.jsonl"
    for name, (record, reason) in BAD.items():
        with pytest.raises(ValueError, match=reason):
            check(record, tmp_path)
        assert name
    config = media_config(tmp_path, path, row_tokens=ROW)
    write_jsonl(path, [*GOOD[:3], BAD["truncated jpeg"][0], *GOOD[3:]])
    with pytest.raises(DataError, match=r"a\.jsonl:4 has a part 1 \(image\) that cannot be decoded: .*truncated"):
        prepare(config, console=QUIET)
    write_jsonl(path, [*GOOD[:3], *(record for record, _ in BAD.values()), *GOOD[3:]])
    skipping = replace(config, folder=str(tmp_path / "skip"))
    skipping = replace(skipping, sources={"media": replace(config.sources["media"], on_bad_record="skip")})
    dataset = made_of(skipping)
    entry = dataset.manifest.sources["media"]
    assert (
        entry.bad_records == len(BAD)
        and entry.count("train", "documents") + entry.count("heldout", "documents") == COUNT
    )


def check(record: Any, folder: Path) -> None:
    """Read and encode one record."""

    fetch = folder_fetch(folder, most_bytes=1 << 20)
    line = media_of(SourceConfig("x", kind="media"), fetch=fetch)(record)
    tokenizer = load_tokenizer(media_tokenizer(), TokenizerConfig())
    MediaEncoder(MediaConfig(), tokenizer, row_tokens=1_000).document(line)


def test_placeholders_in_ordinary_text_are_text(tmp_path: Path) -> None:
    record = {"content": [{"type": "text", "text": "write <image> or <|image|> here"}]}
    line = json.loads(media_of(SourceConfig("x", kind="media"), fetch=None)(record))
    assert line == {"parts": [{"type": "text", "text": "write <image> or <|image|> here"}]}
    dataset = made_of(media_config(tmp_path, write_jsonl(tmp_path / "a.jsonl", [*GOOD, record]), row_tokens=ROW))
    media = every(dataset).media
    assert media is not None
    assert int((every(dataset).tokens == 1).sum()) == len(media.patches)


def test_a_record_longer_than_a_row_is_named_or_dropped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD, {"content": [{"type": "text", "text": "long " * 400}]}])
    with pytest.raises(DataError, match=r"a\.jsonl:25 has .* tokens, more than a row of data.row_tokens=160"):
        prepare(media_config(tmp_path, path, row_tokens=ROW), console=QUIET)
    media = MediaConfig(patch=4, image_patches=16, long_record="drop")
    config = media_config(tmp_path / "drop", path, row_tokens=ROW, media=media)
    assert made_of(config).manifest.sources["media"].description["long_records"] == 1


def test_a_tokenizer_without_placeholders_is_refused(tmp_path: Path) -> None:
    config = media_config(tmp_path, write_jsonl(tmp_path / "a.jsonl", GOOD), row_tokens=ROW)
    config = replace(config, tokenizer=TokenizerConfig(vocab_size=300))
    with pytest.raises(DataError, match=r"no special token '<\|image\|>' .*data.tokenizer.special_tokens"):
        prepare(config, console=QUIET)


def test_data_prepared_with_other_sizes_is_refused(made: DataConfig) -> None:
    other = replace(made, media=replace(made.media, patch=8))
    with pytest.raises(
        DataError, match=r"prepared with data.media.patch=4, and the recipe has 8. Set data.media.patch=4"
    ):
        open_dataset(other)


def test_a_damaged_tar_and_a_tar_without_media_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.png", picture(n)) for n in range(COUNT)])
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"a\.tar .* cannot be read as a tar file"):
        prepare(media_config(tmp_path, path, row_tokens=ROW), console=QUIET)
    twice = write_tar(tmp_path / "b.tar", [("1.png", picture(1)), ("1.png", picture(2))])
    with pytest.raises(DataError, match=r"b\.tar sample 1 \(1\) has two members 'png'"):
        prepare(media_config(tmp_path / "b", twice, row_tokens=ROW), console=QUIET)


def test_bytes_on_disk_that_no_longer_decode_are_named(made: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("cannot be decoded: other library")

    dataset = open_dataset(made)
    monkeypatch.setattr(decode, "open_image", broken)
    with pytest.raises(DataError, match=r"records\.jsonl record \d+: item \d \(image\) cannot be decoded"):
        every(dataset)

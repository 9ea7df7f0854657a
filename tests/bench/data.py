"""`make bench-data`: tokens/s of random-order reading against other loaders, start-up and memory at any size.

Every loader reads packed rows of the same 134 million tokens (uint16, documents of log-normal length, mean about 800), 8
rows a batch, in random order, and gives int64 tokens and labels as torch tensors; one process, no workers, files in the
page cache. Each measurement is a process of its own, loaders taking turns; of each figure the best of the rounds counts.
Prints Markdown.

    python -m tests.bench.data [--rows 2048 8192] [--rounds 3] [--seconds 2] [--only ours megatron]

"memmap" is what one would write by hand: numpy's memory map, a batch gathered by one index, widened once. It keeps no
shares, epochs, documents or checksums and dies with the file. "Per core": tokens per second of CPU time, all threads.
Best-fit rows: packed rows are stored up to some bytes (`data/rows/packing.py`), which this corpus does not exceed; "packed again"
is the speed on a corpus a thousand times larger.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np

HOME = ROOT / "runs" / "bench-data"
TOKENS = 1 << 27
BATCH = 8
Pair = tuple[Any, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", nargs="*", choices=list(LOADERS), default=list(LOADERS))
    parser.add_argument("--no-start-up", action="store_true", help="leave the second table out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child, options.rows[0], options.seconds)
        return 0
    prepare(options.rows, options.only)
    for row in options.rows:
        _table(row, options)
    if not options.no_start_up:
        _start_up_table()
    return 0


def prepare(rows: list[int], names: list[str]) -> None:
    """Make the corpus and the copies that the named loaders need, where they do not exist yet."""
    HOME.mkdir(parents=True, exist_ok=True)
    _make_tokens()
    for row in rows:
        for name in names:
            if name in PREPARE:
                began = time.perf_counter()
                folder = HOME / f"{name}-{row}"
                if not (folder / "done").exists():
                    shutil.rmtree(folder, ignore_errors=True)
                    sys.stderr.write(f"making {folder.name} ...\n")
                    made = subprocess.run(
                        _me(f"prepare-{name}", row, 0), capture_output=True, text=True, env=_environment()
                    )
                    if made.returncode:
                        sys.stderr.write(f"{name} failed:\n{made.stderr[-2000:]}\n")
                        continue
                    (folder / "done").write_text(f"{time.perf_counter() - began:.1f}")


def _table(row: int, options: argparse.Namespace) -> None:
    best: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for name in options.only:
            for key, value in (measure(name, row, options.seconds) or {}).items():
                one = best.setdefault(name, {})
                one[key] = (max if key in ("rate", "per_core") else min)(value, one.get(key, value))
    sys.stdout.write(f"\nRows of {row:,} tokens, {BATCH} a batch:\n\n")
    sys.stdout.write(
        "| loader | Mtokens/s | per core | open and first batch, s | memory, MB (of it files) | copy made, s |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for name, one in sorted(best.items(), key=lambda item: -item[1]["rate"]):
        made = HOME / f"{name}-{row}" / "done"
        sys.stdout.write(
            f"| {LOADERS[name][0]} | {one['rate'] / 1e6:.1f} | {one['per_core'] / 1e6:.1f} | {one['open']:.2f} | "
            f"{one['rss']:.0f} ({one['mapped']:.0f}) | {made.read_text() if made.exists() else '-'} |\n"
        )
    sys.stdout.flush()


def measure(name: str, row: int, seconds: float) -> dict[str, float] | None:
    """Figures of one loader in a process of its own (`_child`); None if it fails, with its error on stderr."""
    result = subprocess.run(_me(name, row, seconds), capture_output=True, text=True, env=_environment(), check=False)
    if result.returncode:
        sys.stderr.write(f"{name} failed:\n{result.stderr[-2000:]}\n")
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])


def _me(child: str, row: int, seconds: float) -> list[str]:
    return [sys.executable, "-m", "tests.bench.data", "--child", child, "--rows", str(row), "--seconds", str(seconds)]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def _child(name: str, row: int, seconds: float) -> None:
    if name.startswith("prepare-"):
        PREPARE[name.removeprefix("prepare-")](row, HOME / f"{name.removeprefix('prepare-')}-{row}")
        return
    if name.startswith("start-up-"):
        sys.stdout.write(json.dumps(_start_up(Path(name.removeprefix("start-up-")))) + "\n")
        return
    import torch

    torch.set_num_threads(1)
    loader = LOADERS[name][1]
    with (HOME / "a.train-00000.bin").open("rb") as stream:
        while stream.read(1 << 24):
            pass
    began = time.perf_counter()
    batches = iter(loader(row))
    tokens, labels = next(batches)
    opened = time.perf_counter() - began
    assert tokens.shape == labels.shape == (BATCH, row) and tokens.dtype == labels.dtype == torch.int64
    assert name in ("ours_best_fit", "ours_packed_anew") or (tokens[:, 1:] == labels[:, :-1]).all()
    for _ in range(20):
        next(batches)
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while (now := time.perf_counter()) - began < seconds:
        for _ in range(10):
            tokens, labels = next(batches)
        count += 10 * BATCH * row
    cpu, wall = time.process_time() - cpu, now - began
    rss, mapped = _memory()
    found = {"rate": count / wall, "per_core": count / cpu, "open": opened, "rss": rss, "mapped": mapped}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # some loaders leave threads or processes behind


def _memory() -> tuple[float, float]:
    """Resident memory of this process and the part of it that is mapped files, in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) / 1024 for key in ("VmRSS", "RssFile"))  # type: ignore[return-value]


def _make_tokens() -> None:
    """The corpus, as a folder of prepared data of this project: one Megatron shard and its manifest."""
    if (HOME / "manifest.json").exists():
        return
    from shards import write_folder

    from data.store.manifest import SourceEntry, read_manifest, write_manifest

    write_folder(HOME, {"a": [[np.arange(200)]]}, heldout=20_000)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, TOKENS, dtype=np.uint16)
    ends = np.cumsum(np.clip(rng.lognormal(6.1, 1.1, TOKENS // 400), 8, 60_000).astype(np.int64))
    ends = np.append(ends[ends < TOKENS], TOKENS)
    tokens[ends - 1] = 0
    entry = write_raw_shard(HOME, "a.train-00000", ends)
    tokens.tofile(HOME / "a.train-00000.bin")
    manifest = read_manifest(HOME, check_files=False)
    source = manifest.sources["a"]
    from data.store.manifest import file_facts

    facts = {suffix: file_facts(HOME / f"a.train-00000.{suffix}") for suffix in ("bin", "idx")}
    entry = type(entry)(**(asdict(entry) | {"files": facts}))
    source = SourceEntry(source.description, source.splits | {"train": [entry]})
    write_manifest(HOME, type(manifest)(manifest.tokenizer, manifest.request, {"a": source}))


def write_raw_shard(folder: Path, name: str, ends: np.ndarray, *, sparse: bool = False) -> Any:
    """A shard's index, and where `sparse` a token file that takes no room. -> its manifest entry, checksums made up."""
    from data.store.manifest import FileFacts, ShardEntry

    lengths = np.diff(ends, prepend=0)
    with (folder / f"{name}.idx").open("wb") as stream:
        import struct

        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(ends), len(ends) + 1))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write(((ends - lengths) * 2).astype("<i8").tobytes())
        stream.write(np.arange(len(ends) + 1, dtype="<i8").tobytes())
    size = int(ends[-1]) * 2
    if sparse:
        with (folder / f"{name}.bin").open("wb") as stream:
            stream.truncate(size)
    index = (folder / f"{name}.idx").stat().st_size
    return ShardEntry(
        path=name,
        documents=len(ends),
        tokens=int(ends[-1]),
        text_bytes=int(ends[-1]) * 4,
        dtype="uint16",
        files={"bin": FileFacts(size, "0" * 64), "idx": FileFacts(index, "0" * 64)},
    )


# The loaders: each yields (tokens, labels) for ever.


def _ours(row: int, **changes: Any) -> Any:
    from data.dataset import open_dataset
    from recipes.schema.data import DataConfig, SourceConfig

    config = DataConfig(folder=str(HOME), sources={"a": SourceConfig(path="-")}, row_tokens=row, **changes)
    return open_dataset(config)


def ours(row: int, **changes: Any) -> Iterator[Pair]:
    dataset = _ours(row, **changes)
    at = 0
    while True:
        batch = dataset.training_rows(np.arange(at, at + BATCH))
        at += BATCH
        yield batch.tokens, batch.labels


def ours_best_fit(row: int) -> Iterator[Pair]:
    return ours(row, packing="best_fit", reset_at_documents=True)


def ours_packed_anew(row: int) -> Iterator[Pair]:
    """As on a corpus so large that no stored packing is used again."""
    import data.rows.packing

    data.rows.packing._CACHE_BYTES = 0
    return ours_best_fit(row)


def ours_documents(row: int) -> Iterator[Pair]:
    return ours(row, reset_at_documents=True)


def ours_stream(row: int) -> Iterator[Pair]:
    from data.stream import Stream

    with Stream(
        _ours(row), position=0, global_rows=8 * BATCH, microbatch_rows=BATCH, rank=0, ranks=1, prefetch_steps=2
    ) as stream:
        for step in stream:
            for batch in step:
                yield batch.tokens, batch.labels


def _order(count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(1)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - BATCH, BATCH):
            yield order[start : start + BATCH]


def memmap(row: int) -> Iterator[Pair]:
    import torch

    tokens = np.memmap(HOME / "a.train-00000.bin", dtype=np.uint16, mode="r")
    span = np.arange(row + 1)
    for rows in _order((len(tokens) - 1) // row):
        both = torch.from_numpy(tokens[rows[:, None] * row + span].astype(np.int64))
        yield both[:, :-1], both[:, 1:]


def memmap_slices(row: int) -> Iterator[Pair]:
    import torch

    tokens = np.memmap(HOME / "a.train-00000.bin", dtype=np.uint16, mode="r").view(np.ndarray)
    for rows in _order((len(tokens) - 1) // row):
        both = np.empty((BATCH, row + 1), dtype=np.int64)
        for place, start in enumerate((rows * row).tolist()):
            both[place] = tokens[start : start + row + 1]
        pair = torch.from_numpy(both)
        yield pair[:, :-1], pair[:, 1:]


def megatron(row: int) -> Iterator[Pair]:
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 300, 0, 0, {"class": "none"}

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=row, blend=([str(HOME / "a.train-00000")], None), split="1,0,0",
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        tokenizer=Tokenizer(), path_to_cache=str(HOME / "megatron-cache"), mid_level_dataset_surplus=0.0,
    )  # fmt: skip
    prefix = str(HOME / "a.train-00000")
    indexed = IndexedDataset(prefix, multimodal=False, mmap=True)
    documents = np.arange(indexed.sequence_lengths.shape[0], dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)
    count = len(dataset)
    at = 0
    while True:
        rows = [dataset[(at + i) % count] for i in range(BATCH)]  # its index is already in random order
        at += BATCH
        yield torch.stack([r["tokens"] for r in rows]), torch.stack([r["labels"] for r in rows])


def _peer(name: str) -> None:
    folder = ROOT / ".peers" / name
    if not folder.is_dir():
        raise SystemExit(f"{name} is not there: bash tests/bench/install_peers.sh")
    sys.path.append(str(folder))


def litdata_prepare(row: int, folder: Path) -> None:
    _peer("litdata")
    import torch
    from litdata import TokensLoader, optimize

    optimize(
        fn=_pieces,
        inputs=list(range(8)),
        output_dir=str(folder),
        num_workers=1,
        chunk_size=(row + 1) * max(1, (1 << 25) // (row + 1)),
        item_loader=TokensLoader(block_size=row + 1),
    )
    del torch


def _pieces(part: int) -> Iterator[Any]:
    import torch

    tokens = np.memmap(HOME / "a.train-00000.bin", dtype=np.uint16, mode="r")
    size = len(tokens) // 8
    for start in range(part * size, (part + 1) * size, 1 << 16):
        yield torch.from_numpy(np.array(tokens[start : min(start + (1 << 16), (part + 1) * size)]))


def litdata(row: int) -> Iterator[Pair]:
    _peer("litdata")
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        str(HOME / f"litdata-{row}"), item_loader=TokensLoader(block_size=row + 1), shuffle=True, drop_last=True, seed=1
    )
    while True:
        for both in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True):
            wide = both.to(torch.int64)
            yield wide[:, :-1], wide[:, 1:]


def _rows(row: int) -> Iterator[np.ndarray]:
    tokens = np.memmap(HOME / "a.train-00000.bin", dtype=np.uint16, mode="r")
    for start in range(0, len(tokens) - row - 1, row):
        yield np.array(tokens[start : start + row + 1])


def arrow_prepare(row: int, folder: Path) -> None:
    import datasets

    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"), length=row + 1)})
    made = datasets.Dataset.from_generator(
        lambda: ({"tokens": one} for one in _rows(row)), features=features, cache_dir=str(folder / "made")
    )
    made.save_to_disk(str(folder / "set"))
    shutil.rmtree(folder / "made")


def arrow(row: int) -> Iterator[Pair]:
    import datasets
    import torch

    dataset = datasets.load_from_disk(str(HOME / f"arrow-{row}" / "set")).with_format("numpy")
    for rows in _order(len(dataset)):
        both = torch.from_numpy(np.asarray(dataset[rows]["tokens"]).astype(np.int64))
        yield both[:, :-1], both[:, 1:]


def parquet_prepare(row: int, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rows = list(_rows(row))
    for part in range(8):
        mine = np.stack(rows[part::8])
        table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(pa.array(mine.reshape(-1)), row + 1)})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=512)


def parquet(row: int) -> Iterator[Pair]:
    import datasets
    import torch

    files = sorted(str(f) for f in (HOME / f"parquet-{row}").glob("*.parquet"))
    while True:
        dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        for batch in dataset.shuffle(seed=1, buffer_size=1000).with_format("numpy").batch(BATCH, drop_last_batch=True):
            both = torch.from_numpy(np.asarray(batch["tokens"]).astype(np.int64))
            yield both[:, :-1], both[:, 1:]


def mds_prepare(row: int, folder: Path) -> None:
    _peer("streaming")
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{row + 1}"}) as writer:
        for one in _rows(row):
            writer.write({"tokens": one})


def mds(row: int) -> Iterator[Pair]:
    _peer("streaming")
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    def collate(items: list[dict[str, np.ndarray]]) -> Any:
        return torch.from_numpy(np.stack([item["tokens"] for item in items]).astype(np.int64))

    dataset = StreamingDataset(local=str(HOME / f"mds-{row}"), shuffle=True, batch_size=BATCH, shuffle_seed=1)
    while True:
        for both in DataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=collate, drop_last=True):
            yield both[:, :-1], both[:, 1:]


LOADERS: dict[str, tuple[str, Callable[[int], Iterator[Pair]]]] = {
    "ours": ("**this project**", ours),
    "ours_stream": ("this project, read ahead by a thread", ours_stream),
    "ours_documents": ("this project, with document boundaries", ours_documents),
    "ours_best_fit": ("this project, best-fit rows with boundaries", ours_best_fit),
    "ours_packed_anew": ("this project, best-fit rows, each packed again", ours_packed_anew),
    "memmap": ("memmap, batched", memmap),
    "memmap_slices": ("memmap, a slice a row", memmap_slices),
    "litdata": ("litdata 0.2.76, TokensLoader", litdata),
    "arrow": ("Hugging Face datasets, Arrow on disk", arrow),
    "parquet": ("Hugging Face datasets, parquet stream, shuffle buffer 1,000", parquet),
    "megatron": ("Megatron-Core 0.19.2, GPTDataset", megatron),
    "mds": ("mosaicml-streaming 0.13, MDS", mds),
}
PREPARE: dict[str, Callable[[int, Path], None]] = {
    "litdata": litdata_prepare,
    "arrow": arrow_prepare,
    "parquet": parquet_prepare,
    "mds": mds_prepare,
}


# Start-up and memory, sparse files: nothing of their size is written.


def _start_up_table() -> None:
    sys.stdout.write(
        "\nOpening a blend of three sources with two phase changes and a ramp, rows of 8,192, sparse shards:\n\n"
    )
    sys.stdout.write(
        "| tokens | shards | open, ms | first batch of 8 rows, ms | batch in the ramp, ms | memory added, MB |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for label, tokens, shards in (("100M", 10**8, 3), ("1B", 10**9, 6), ("1T", 10**12, 300), ("10T", 10**13, 3000)):
        with tempfile.TemporaryDirectory(dir=HOME) as folder:
            _sparse_set(Path(folder), tokens, shards)
            runs = [measure(f"start-up-{folder}", 8192, 0) for _ in range(3)]
        best = {key: min(run[key] for run in runs if run) for key in ("open", "first", "ramp", "added")}
        sys.stdout.write(
            f"| {label} | {shards:,} | {best['open'] * 1e3:.0f} | {best['first'] * 1e3:.1f} | {best['ramp'] * 1e3:.1f} | "
            f"{best['added']:.1f} |\n"
        )
        sys.stdout.flush()


def _sparse_set(folder: Path, tokens: int, shards: int) -> None:
    from shards import write_folder

    from data.store.manifest import SourceEntry, write_manifest

    names = ("web", "code", "math")
    manifest = write_folder(folder, {name: [[np.arange(1, 300)]] for name in names}, heldout=20_000)
    each = tokens // shards
    ends = np.linspace(each // 1000, each, 1000).astype(np.int64)
    sources = {}
    for name in names:
        entries = [
            write_raw_shard(folder, f"{name}.train-{i:05d}", ends, sparse=True) for i in range(shards // len(names))
        ]
        sources[name] = SourceEntry({}, manifest.sources[name].splits | {"train": entries})
    write_manifest(folder, type(manifest)(manifest.tokenizer, manifest.request, sources))


def _start_up(folder: Path) -> dict[str, float]:
    import torch  # noqa: F401

    from data.dataset import open_dataset
    from recipes.schema.data import DataConfig, PhaseConfig, SourceConfig

    total = sum(p.stat().st_size // 2 for p in folder.glob("*.train-*.bin"))
    config = DataConfig(
        folder=str(folder),
        sources={name: SourceConfig(path="-", weight=w) for name, w in (("web", 0.7), ("code", 0.2), ("math", 0.1))},
        row_tokens=8192,
        verify="never",
        phases=(
            PhaseConfig(total * 6 // 10, {"web": 0.5, "code": 0.3, "math": 0.2}, ramp_tokens=total // 10),
            PhaseConfig(total * 9 // 10, {"web": 0.2, "code": 0.3, "math": 0.5}),
        ),
    )
    before = _memory()[0]
    began = time.perf_counter()
    dataset = open_dataset(config)
    opened = time.perf_counter()
    dataset.training_rows(np.arange(8))
    first = time.perf_counter()
    dataset.training_rows(np.arange(8) + total * 65 // 100 // 8192)
    ramp = time.perf_counter()
    added = _memory()[0] - before
    return {"open": opened - began, "first": first - opened, "ramp": ramp - first, "added": added}


if __name__ == "__main__":
    sys.exit(main())

"""`python -m data.prepare -cn RECIPE [data.key=value ...]`: raw text -> tokenizer, token shards, manifest.

    sources --split by document--> (train texts) --> BPE --> tokenizer.json
                              \\--> tokenize --> SOURCE.train.bin/.idx, SOURCE.heldout.bin/.idx --> manifest.json

A second run finds the finished work and stops; after a kill, finished sources are not tokenized again. The output does
not depend on the number of workers. A folder with other data is never overwritten.
"""

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data.command import dotted_keys, run_command
from data.config import DataConfig, SourceConfig
from data.corpus import Document, documents, source_files
from data.errors import DataError
from data.manifest import (
    MANIFEST,
    SPLITS,
    Manifest,
    ShardEntry,
    SourceEntry,
    TokenizerEntry,
    file_sha256,
    read_manifest,
    source_entry,
    write_durably,
    write_manifest,
)
from data.origins import pack_origins
from data.shards import ShardWriter, write_bytes_durably
from data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, train_tokenizer
from data.typed import build

_BATCH = 64
"""Documents handed to the tokenizer at once."""


def main() -> int:
    """Entry point of `python -m data.prepare`."""
    return run_command(
        _prepare, program="data.prepare", keys=dotted_keys(DataConfig, "data."), user_errors=(DataError,)
    )


def prepare(config: DataConfig, *, console: Console) -> Manifest:
    """Bring `config.folder` to hold what `config` asks for. -> its manifest.

    Raises DataError for bad input, and for a folder that holds other data, which is left as it is.
    """
    if not config.sources:
        raise DataError("data.sources is empty. Name at least one source, e.g. data.sources.mine.path=texts/*.jsonl.")
    folder = Path(config.folder)
    request = _request(config)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _same_request(folder, manifest.request, request)
        console.print(f"{folder} is up to date.")
        return manifest
    for name, source in config.sources.items():
        source_files(name, source)  # a missing file is found before anything is written
    os.environ["RAYON_NUM_THREADS"] = str(config.workers)  # the tokenizers library's own thread pool
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _keep_request(folder, request)
        with _bars(console) as bars:
            tokenizer = _tokenizer(config, folder, bars)
            sources = {name: _source(config, name, folder, tokenizer, bars) for name in config.sources}
        manifest = Manifest(
            tokenizer=TokenizerEntry(
                file=TOKENIZER_FILE,
                sha256=file_sha256(folder / TOKENIZER_FILE),
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod=tokenizer.eod,
            ),
            request=request,
            sources=sources,
        )
        write_manifest(folder, manifest)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}. Finished sources are kept.") from error
    for name, entry in sources.items():
        tokens = entry.count("train", "tokens")
        console.print(
            f"{name}: {entry.count('train', 'documents'):,} documents, {tokens:,} tokens, "
            f"{entry.count('train', 'text_bytes') / tokens:.2f} bytes per token; held out: "
            f"{entry.count('heldout', 'documents'):,} documents, {entry.count('heldout', 'tokens'):,} tokens"
        )
    console.print(f"Prepared {folder} in {time.perf_counter() - started:.1f} s.")
    return manifest


def split_documents(config: DataConfig, name: str) -> Iterator[tuple[str, Document]]:
    """(split, document) of every document of a source; deterministic, and at least one document in each split.

    A document is held out when its number, hashed with the seed, falls below `heldout_fraction`; the first one always is
    and the second never, so that neither split is empty. A source of a single document is cut in two at a line end.
    """
    found = documents(name, config.sources[name])
    first = next(found)
    second = next(found, None)
    if second is None:
        lines = first.text.splitlines(keepends=True)
        if len(lines) < 2:
            raise DataError(f"source {name!r} is a single line, so nothing can be held out. Give it more documents.")
        keep = min(len(lines) - 1, max(1, round(len(lines) * (1 - config.heldout_fraction))))
        yield "train", replace(first, text="".join(lines[:keep]))
        yield "heldout", replace(first, text="".join(lines[keep:]))
        return
    yield "heldout", first
    yield "train", second
    for number, document in enumerate(found, start=2):
        digest = hashlib.sha256(f"{config.seed}/{name}/{number}".encode()).digest()
        held = int.from_bytes(digest[:8], "little") < config.heldout_fraction * 2**64
        yield ("heldout" if held else "train"), document


def _prepare(composed: DictConfig) -> int:
    plain: Any = OmegaConf.to_container(composed.data, resolve=True)
    prepare(build(DataConfig, plain, "data"), console=Console(stderr=True))
    return 0


def _request(config: DataConfig) -> dict[str, Any]:
    """The fields the prepared files depend on."""
    sources = {
        name: {key: value for key, value in asdict(source).items() if key != "weight"}
        for name, source in config.sources.items()
    }
    request = {
        "sources": sources,
        "tokenizer": asdict(config.tokenizer),
        "heldout_fraction": config.heldout_fraction,
        "seed": config.seed,
    }
    return json.loads(json.dumps(request))


def _keep_request(folder: Path, request: dict[str, Any]) -> None:
    """Remember what unfinished work was for; refuse to mix it with other work."""
    path = folder / "request.json"
    if path.exists():
        _same_request(folder, json.loads(path.read_text()), request)
    path.write_text(json.dumps(request, indent=1))


def _same_request(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    if there == asked:
        return
    changed = ", ".join(key for key in asked if there.get(key) != asked[key])
    raise DataError(
        f"{folder} holds data prepared differently ({changed} changed). Nothing was overwritten: choose another "
        f"data.folder, or remove {folder}."
    )


def _tokenizer(config: DataConfig, folder: Path, bars: Progress) -> Tokenizer:
    path = folder / TOKENIZER_FILE
    if path.exists():
        return load_tokenizer(path, config.tokenizer)
    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(Path(config.tokenizer.path), config.tokenizer)
    else:
        bar = bars.add_task(f"training a BPE of {config.tokenizer.vocab_size:,}", total=None)

        def texts() -> Iterator[str]:
            for name in config.sources:
                for split, document in split_documents(config, name):
                    if split == "train":
                        bars.advance(bar)
                        yield document.text

        tokenizer = train_tokenizer(texts(), config.tokenizer)
        bars.update(bar, total=1, completed=1)
    aside = folder / f"{TOKENIZER_FILE}.writing"
    tokenizer.save(aside)
    aside.rename(path)
    return tokenizer


def _source(config: DataConfig, name: str, folder: Path, tokenizer: Tokenizer, bars: Progress) -> SourceEntry:
    """Tokenize one source, or find that it was done."""
    done = folder / f"{name}.json"
    if done.exists():
        return source_entry(json.loads(done.read_text()))
    bar = bars.add_task(f"tokenizing {name}", total=_expected_bytes(config.sources[name], name))
    text_bytes = dict.fromkeys(SPLITS, 0)
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    starts: dict[str, list[int]] = {split: [] for split in SPLITS}
    records: dict[str, list[int]] = {split: [] for split in SPLITS}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(folder / f"{name}.{split}", vocab_size=tokenizer.vocab_size))
            for split in SPLITS
        }
        for batch in _batches(split_documents(config, name)):
            encoded = tokenizer.encode_batch([document.text for _, document in batch])
            for (split, document), ids in zip(batch, encoded, strict=True):
                if files[split][-1:] != [document.file]:
                    files[split].append(document.file)
                    starts[split].append(len(records[split]))
                records[split].append(document.ordinal)
                writers[split].add([*ids, tokenizer.eod])
                size = len(document.text.encode())
                text_bytes[split] += size
                bars.advance(bar, size)
        entries: dict[str, list[ShardEntry]] = {}
        for split, writer in writers.items():
            facts = writer.finish()
            content = pack_origins(files[split], starts[split], np.array(records[split], dtype=np.uint32))
            facts["origins"] = write_bytes_durably(folder / f"{name}.{split}.origins", content)
            entry = ShardEntry(
                path=f"{name}.{split}",
                documents=len(writer.lengths),
                tokens=writer.tokens,
                text_bytes=text_bytes[split],
                dtype=writer.dtype.name,
                files=facts,
            )
            entries[split] = [entry]
    bars.update(bar, total=bars.tasks[bar].completed)
    source = SourceEntry(description={"path": config.sources[name].path}, splits=entries)
    write_durably(done, json.dumps(asdict(source)))
    return source


def _batches(items: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch


def _expected_bytes(source: SourceConfig, name: str) -> float | None:
    """Size of the source's text where the files tell it; None shows a bar without an end."""
    files = source_files(name, source)
    if any(file.suffix in (".gz", ".zst", ".parquet", ".jsonl") for file in files):
        return source.max_bytes
    total = sum(file.stat().st_size for file in files)
    return min(total, source.max_bytes or total)


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    sys.exit(main())

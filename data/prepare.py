"""`stratum prepare`: raw text -> tokenizer, token shards, manifest.

    sources --plan--> which parts make which shard --> plan.json
            --train split, or a file--> tokenizer
    each shard: read, tokenize, write --> SOURCE/00000.train.bin/.idx/.origins, ...heldout..., SOURCE/00000.json
    all shards done --> manifest.json

If the data is prepared already, a second run says so and stops. After a kill, finished shards are not made again. The
output does not depend on the number of workers or tasks. A folder that contains other data is never overwritten.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from data.chat.record import words_of
from data.make.corpus import Reader
from data.make.folder_plan import FolderPlan, plan_folder, read_stamps, refuse_other_request, request_of, stamp_of
from data.make.lock import prepare_lock
from data.make.pool import make_shards
from data.make.progress import Display
from data.make.shard_job import ShardJob, read_results, with_splits
from data.media.record import media_words_of
from data.sources.files import find_files, is_remote
from data.sources.sets import is_set
from data.store.manifest import (
    DESCRIBED,
    MANIFEST,
    SPLITS,
    Manifest,
    SourceEntry,
    TokenizerEntry,
    file_sha256,
    read_manifest,
    write_manifest,
)
from data.system import disk
from data.system.console import open_console
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from recipes.schema import units
from recipes.schema.data import DataConfig
from recipes.schema.data_rules import data_problems
from recipes.schema.errors import DataError, refuse
from recipes.schema.foreign import printable
from recipes.schema.options import hand_over
from recipes.schema.typed import build

_COUNTED = {
    "preference": ("groups", "pairs"),
    "media": ("images", "clips", "frames", "files", "media_bytes"),
}
"""By kind of source: counts of a split in the manifest, besides `learned` and `padding`."""


@dataclass(frozen=True)
class Task:
    """The part of the work that this process does."""

    index: int = 0
    count: int = 1
    """This process makes shards index, index + count, ... of all. 0: it makes no shard."""
    merge: bool = True
    """Write the manifest, with a DataError if a shard is missing. False: write it only if all shards exist."""


def parse_task(text: str | None) -> Task:
    """The task that `--task` names. DataError, with the allowed texts, for any other."""
    if text is None:
        return Task()
    if text == "plan":
        return Task(count=0, merge=False)
    if text == "merge":
        return Task(count=0)
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    if numbers:
        index, count = map(int, numbers.groups())
        if index < count:
            return Task(index=index, count=count, merge=False)
    raise DataError(f"--task {text} is not a task. Use plan, merge, or a number below a count, 0/16 to 15/16.")


def prepare(config: DataConfig, *, console: Console, task: str | None = None) -> Manifest | None:
    """Prepare the data of `config` in `config.folder`. -> its manifest; None if other tasks still have shards to make.

    Raises DataError for bad input, and for a folder that contains other data. That folder is not changed.
    """
    todo = parse_task(task)
    refuse(data_problems(config), DataError)
    folder = Path(config.folder)
    if (folder / MANIFEST).exists():
        return _up_to_date(config, folder, console)
    os.environ.setdefault("RAYON_NUM_THREADS", str(config.workers))  # the tokenizers library's own thread pool
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with prepare_lock(folder, is_shared=todo.count != 1, say=lambda line: _say(console, line)):
            manifest = _prepare_locked(config, folder, todo, task, console)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}. Finished shards are kept.") from error
    if manifest is not None:
        _say(console, f"Prepared {folder} in {_since(started)}.")
    return manifest


def _prepare_locked(
    config: DataConfig, folder: Path, todo: Task, task: str | None, console: Console
) -> Manifest | None:
    started = time.perf_counter()
    if (folder / MANIFEST).exists():  # another process made it meanwhile
        return _up_to_date(config, folder, console)
    if task is None:
        _remove_leftovers(folder)
    plan = plan_folder(config, folder, say=lambda line: _say(console, line))
    jobs = jobs_of(config, plan)
    tokenizer = _tokenizer(config, folder, jobs, console)
    _make_missing(config, todo, jobs, tokenizer, console)
    left = sum(not job.result.exists() for job in jobs)
    if not todo.merge and (left or not todo.count):
        _say(
            console,
            f"Task {task} of {folder} took {_since(started)}; {left} of {len(jobs)} shards are still to be made.",
        )
        return None
    return _merge(folder, plan, jobs, tokenizer, console)


def _up_to_date(config: DataConfig, folder: Path, console: Console) -> Manifest:
    """A finished folder's manifest. DataError if it was prepared from another request."""
    manifest = read_manifest(folder)
    refuse_other_request(folder, manifest.request, request_of(config))
    _say(console, f"{folder} is up to date.")
    for line in _changes(config, manifest, read_stamps(folder)):
        _say(console, line)
    return manifest


def jobs_of(config: DataConfig, plan: FolderPlan) -> list[ShardJob]:
    """Every shard of the folder, source by source."""
    fixed_splits = plan.fixed_splits  # computed once, not for each job
    return [
        ShardJob(
            folder=Path(config.folder),
            name=name,
            number=number,
            source=config.sources[name],
            parts=parts,
            fixed_splits=fixed_splits,
            is_single=not source.train,
            seed=config.seed,
            fraction=config.heldout_of(name),
            shard_bytes=config.shard_bytes,
            chat=config.chat,
            media=config.media,
            row_tokens=config.row_tokens,
        )
        for name, source in plan.sources.items()
        for number, parts in enumerate(source.shards)
    ]


def prepare_recipe(task: str | None, composed: DictConfig) -> int:
    """Prepare the data of a composed recipe. -> exit status."""
    plain: Any = OmegaConf.to_container(composed.data, resolve=True)
    console = open_console(stderr=True)
    try:
        prepare(build(DataConfig, plain, "data"), console=console, task=task)
    except KeyboardInterrupt:
        _say(console, "Interrupted. Finished shards are kept; the same command continues.")
        return 130
    return 0


def _tokenizer(config: DataConfig, folder: Path, jobs: list[ShardJob], console: Console) -> Tokenizer:
    """The folder's tokenizer: the stored one, else a copy of the recipe's, else one trained on the training texts."""
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer.ranks.json"):
        if (folder / name).is_file():
            return load_tokenizer(folder / name, config.tokenizer)
    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(Path(config.tokenizer.path), config.tokenizer)
    else:
        if all(job.source.format == "megatron" for job in jobs):
            raise DataError(
                "the sources are Megatron sets, which are tokenized already. Set data.tokenizer.path to the tokenizer they "
                "were made with."
            )
        with console.status(f"training a BPE of {config.tokenizer.vocab_size:,} tokens"):
            tokenizer = train_tokenizer(_training_texts(config, jobs), config.tokenizer)
    with disk.written_aside(folder / tokenizer.file, is_own=True) as aside:
        tokenizer.save(aside)
    return tokenizer


def _training_texts(config: DataConfig, jobs: list[ShardJob]) -> Iterator[str]:
    """Training texts of every source, at most `train_bytes` in total: the same amount from the beginning of each source."""
    names = {job.name for job in jobs if job.source.format != "megatron"}
    for name in sorted(names):
        left = config.tokenizer.train_bytes // len(names)
        reader = Reader(
            name, replace(config.sources[name], on_bad_record="skip")
        )  # making the shard reports bad records
        for job in jobs:
            for part in job.parts if job.name == name else []:
                for text in with_splits(job, reader.documents(part)) if left > 0 else ():
                    if text.split == "train":
                        words = text.document.text
                        if job.source.kind == "media":
                            words = media_words_of(words)
                        elif job.has_messages:
                            words = words_of(words)
                        left -= len(words.encode()) if job.source.kind == "media" else text.bytes
                        yield words
                    if left <= 0:
                        break


def _make_missing(config: DataConfig, todo: Task, jobs: list[ShardJob], tokenizer: Tokenizer, console: Console) -> None:
    """Make the shards of this task that are not finished."""
    mine = jobs[todo.index :: todo.count] if todo.count else []
    missing = [job for job in mine if not job.result.exists()]
    if len(missing) < len(mine):
        _say(console, f"{len(mine) - len(missing)} of {len(mine)} shards are finished already.")
    if not missing:
        return
    largest = max((part for job in missing for part in job.parts), key=lambda part: part.size)
    if config.workers > 1 and largest.size > 4 * config.shard_bytes:
        _say(
            console,
            f"{largest.file} ({units.size(largest.size)}) cannot be cut, so one process reads all of it. "
            f"Smaller files are prepared faster.",
        )
    if tokenizer.note is not None:
        _say(console, tokenizer.note)
    sizes: dict[str, int] = {}
    for job in missing:
        sizes[job.name] = sizes.get(job.name, 0) + job.size
    with Display(console, sizes) as display:
        make_shards(
            missing,
            tokenizer,
            Path(config.folder) / tokenizer.file,
            config.tokenizer,
            workers=config.workers,
            advance=display.advance,
        )
    _say(console, f"tokenized {units.size(sum(sizes.values()))}; {display.speed}")


def _merge(folder: Path, plan: FolderPlan, jobs: list[ShardJob], tokenizer: Tokenizer, console: Console) -> Manifest:
    """Write the manifest of the finished shards. DataError if one is missing."""
    missing = [job.prefix for job in jobs if not job.result.exists()]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(jobs)} shards (the first: {missing[0]}). Run their tasks again, or run "
            f"without --task to make all missing shards."
        )
    manifest = Manifest(
        tokenizer=TokenizerEntry(
            file=tokenizer.file,
            sha256=file_sha256(folder / tokenizer.file),
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
        ),
        request=plan.request,
        sources={name: _merge_source(name, plan, jobs, tokenizer, console) for name in plan.sources},
    )
    write_manifest(folder, manifest)
    return manifest


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of killed processes. Call it only if no other task can be running."""
    for left in folder.rglob("*.writing-*"):
        left.unlink(missing_ok=True)


def _changes(config: DataConfig, manifest: Manifest, stamps: dict[str, str]) -> Iterator[str]:
    """A line for each source whose files changed after they were read. Sources that cannot be found or counted are skipped."""
    for name, source in config.sources.items():
        remedy = "The prepared data is not changed. To include the changes, prepare into another data.folder."
        description = manifest.sources[name].description
        is_counted = not (is_remote(source.path) or is_set(source) or source.format == "megatron" or source.max_bytes)
        if is_counted:
            try:
                now = find_files(f"data.sources.{name}.path", source.path)
            except DataError:
                continue  # prepared data does not need its sources
            if (len(now), sum(file.size for file in now)) != (description["files"], description["bytes"]):
                yield (
                    f"{name}: there are {len(now):,} files of {units.size(sum(file.size for file in now))} now, "
                    f"{description['files']:,} of {units.size(description['bytes'])} were read. {remedy}"
                )
                continue
        stamp = stamp_of(config, name) if name in stamps else None
        if stamp is None or stamp == stamps[name]:
            continue
        if is_set(source):
            yield f"{name}: the set {source.path} changed since it was prepared. {remedy}"
        else:
            yield f"{name}: files of {source.path} were changed, added or removed since they were read. {remedy}"


def _say(console: Console, text: str) -> None:
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"


def _merge_source(
    name: str, plan: FolderPlan, jobs: list[ShardJob], tokenizer: Tokenizer, console: Console
) -> SourceEntry:
    entry = SourceEntry(
        description={
            "path": plan.request["sources"][name]["path"],
            "files": plan.sources[name].files,
            "bytes": plan.sources[name].bytes,
        },
        splits={split: [] for split in SPLITS},
    )
    records_before: dict[str, int] = {}
    problems: list[str] = []
    unended = unknown = long_records = 0
    chats: dict[str, dict[str, int]] = {}
    kind = plan.request["sources"][name].get("kind", "text")
    is_preference = kind == "preference"
    what = DESCRIBED.get(kind, "chats")
    wanted = ("learned", "padding", *_COUNTED.get(kind, ()))
    for job in jobs:
        if job.name != name:
            continue
        first = records_before.get(job.parts[0].file, 0)
        for result in read_results(job):
            for split, shard in result.splits.items():
                entry.splits[split].append(replace(shard, first_record=first))
            for file, records in result.records.items():
                records_before[file] = records_before.get(file, 0) + records
            problems += result.problems
            unended += result.unended
            unknown += result.unknown
            long_records += result.long_records
            for split, counts in result.chats.items():
                sums = chats.setdefault(split, dict.fromkeys(wanted, 0))
                for key in wanted:
                    sums[key] += getattr(counts, key)
            entry = replace(
                entry,
                bad_records=entry.bad_records + result.bad_records,
                empty_documents=entry.empty_documents + result.empty_documents,
            )
    if chats:
        entry = replace(entry, description=entry.description | {what: chats, "long_records": long_records})
    tokens, text_bytes = (sum(entry.count(split, what) for split in SPLITS) for what in ("tokens", "text_bytes"))
    _say(
        console,
        f"{name}: {entry.count('train', 'documents'):,} documents, {entry.count('train', 'tokens'):,} tokens, "
        f"{text_bytes / max(1, tokens):.2f} bytes per token; held out: "
        f"{entry.count('heldout', 'documents'):,} documents, {entry.count('heldout', 'tokens'):,} tokens",
    )
    if chats:
        train, all_tokens = chats["train"], max(1, entry.count("train", "tokens"))
        _say(
            console,
            f"{name}: {train['learned']:,} tokens are learned ({train['learned'] / all_tokens:.1%}), {train['padding']:,} "
            f"fill up rows ({train['padding'] / all_tokens:.1%}); {long_records:,} {'records' if kind == 'media' else what} left "
            f"out, longer than a row",
        )
    if kind == "media":
        found = {key: sum(counts[key] for counts in chats.values()) for key in _COUNTED["media"]}
        _say(
            console,
            f"{name}: {found['images']:,} images, {found['clips']:,} clips of audio, {found['frames']:,} frames of video; "
            f"{found['files']:,} different files, {units.size(found['media_bytes'])}",
        )
    if is_preference:
        shown = [f"{chats[split]['groups']:,} with {chats[split]['pairs']:,} pairs" for split in SPLITS]
        _say(console, f"{name}: preferences: {shown[0]}; held out: {shown[1]}")
    if unended:
        _say(
            console,
            f"{name}: {unended:,} documents do not end with the end-of-document token (id {tokenizer.eod}), so the model sees "
            f"each joined to the next. Check data.tokenizer.end_of_document, or make the set with --append-eod.",
        )
    if unknown:
        _say(
            console,
            f"{name}: {unknown:,} words or characters became the unknown token, because the tokenizer "
            f"has no token for them. Set data.tokenizer.path to a tokenizer that covers this source.",
        )
    if entry.bad_records:
        _say(console, f"{name}: left out {entry.bad_records:,} bad records, e.g. {problems[0]}")
    return entry


if __name__ == "__main__":
    hand_over("prepare", *sys.argv[1:])

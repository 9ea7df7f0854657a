"""What preparing a folder takes, decided once: which parts make which shard, and which texts go where.

    plan.json    request (the recipe fields the content depends on), and per source the parts of each shard

Every task and every restart works from the same plan, which is why the bytes do not depend on how the work was shared out.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.make.corpus import first_two
from data.make.megatron_sets import find_sets
from data.sources.parts import cut, limited
from data.sources.records import Part
from data.system import disk
from recipes.schema.data import DataConfig
from recipes.schema.errors import DataError, refuse
from recipes.schema.rules import source_problems

PLAN = "plan.json"
_NONE = "-"
"""In place of a digest: no text is dealt otherwise than its number says."""
_PREPARED_FIELDS = ("path", "format", "text_field", "template", "config", "split", "streaming", "on_bad_record",
                    "max_record_bytes", "max_expansion", "max_bytes")  # fmt: skip
_TOKENIZER_FIELDS = ("path", "vocab_size", "end_of_document", "special_tokens", "pattern", "rank_offset", "keep_vocab",
                     "train_bytes")  # fmt: skip


@dataclass(frozen=True)
class SourceWork:
    """The work of one source."""

    shards: list[list[Part]]
    """Parts of each shard; of a Megatron set, one part that names it."""
    heldout: str
    """Digest of a text that is held out whatever its number says, so that there is one; empty for a Megatron set."""
    train: str
    """The same for training; empty where the source is a single document, which is cut in two."""

    @property
    def bytes(self) -> int:
        """Stored bytes of the files; of a set on disk, of its tables."""
        whole = {part.file: part.file_size or 0 for group in self.shards for part in group}
        return sum(whole.values()) or sum(part.size for group in self.shards for part in group)

    @property
    def files(self) -> int:
        """Number of files, or sets."""
        return len({part.file for group in self.shards for part in group})


@dataclass(frozen=True)
class Work:
    """All of it."""

    request: dict[str, Any]
    sources: dict[str, SourceWork]


def request_of(config: DataConfig) -> dict[str, Any]:
    """The fields the prepared files depend on."""
    sources = {name: _picked(asdict(source), _PREPARED_FIELDS) for name, source in config.sources.items()}
    for name, source in config.sources.items():
        if source.heldout_fraction is not None:
            sources[name]["heldout_fraction"] = source.heldout_fraction
    request = {
        "sources": sources,
        "tokenizer": _picked(asdict(config.tokenizer), _TOKENIZER_FIELDS),
        "heldout_fraction": config.heldout_fraction,
        "seed": config.seed,
        "shard_bytes": config.shard_bytes,
    }
    plain: dict[str, Any] = json.loads(json.dumps(request))
    return plain


def plan_work(config: DataConfig, folder: Path) -> Work:
    """The plan of a folder: what another task or an earlier run decided, or made now and kept. Reads the beginning of each
    source, and `max_bytes` of those that have it.

    Raises DataError for sources without files or text, and for a folder begun with another request.
    """
    request = request_of(config)
    path = folder / PLAN
    if path.exists():
        try:
            raw = json.loads(path.read_text())
            sources = {name: _source_work(entry) for name, entry in raw["sources"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {error!r}. Remove {folder} and prepare again.") from error
        same_request(folder, raw["request"], request)
        return Work(request, sources)
    work = Work(request, {name: _plan_source(config, name) for name in config.sources})
    disk.write_text(path, json.dumps(asdict(work)), is_own=True)
    return work


def same_request(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to mix the work of two requests. DataError names what changed."""
    if there == asked:
        return
    changed = ", ".join(_differences(there, asked, ""))
    raise DataError(
        f"{folder} holds data prepared differently ({changed} changed). Nothing was overwritten: choose another "
        f"data.folder, or remove {folder}."
    )


def _plan_source(config: DataConfig, name: str) -> SourceWork:
    source, place = config.sources[name], f"data.sources.{name}"
    refuse(source_problems(config, name), DataError)
    if source.format == "megatron":
        return SourceWork([[part] for part in find_sets(place, source)], heldout="", train="")
    shards = limited(place, source, cut(place, source, config.shard_bytes))
    fraction = config.heldout_of(name)
    if fraction == 1:
        return SourceWork(shards, heldout=_NONE, train=_NONE)
    heldout, *train = first_two(name, source, shards, seed=config.seed, fraction=fraction)
    return SourceWork(shards, heldout=heldout, train=train[0] if train else "")


def _source_work(raw: dict[str, Any]) -> SourceWork:
    shards = [[Part(**part) for part in group] for group in raw["shards"]]
    return SourceWork(shards, heldout=raw["heldout"], train=raw["train"])


def _picked(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _differences(there: Any, asked: Any, where: str) -> list[str]:
    """Dotted names of what differs."""
    if not isinstance(there, dict) or not isinstance(asked, dict):
        return [where] if there != asked else []
    dotted = f"{where}." if where else ""
    return [
        difference
        for key in sorted(there.keys() | asked.keys())
        for difference in _differences(there.get(key), asked.get(key), f"{dotted}{key}")
    ]

"""The plan of a folder, made once: the parts of each shard, and the texts whose split is fixed.

    plan.json    request (the recipe fields the content depends on), and per source the parts of each shard

Every task and every restart works from the same plan, which is why the bytes do not depend on how the work was shared out.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.chat.template import template_source
from data.make.corpus import first_two
from data.make.megatron_sets import find_sets
from data.sources.files import again_where_far, find_files, is_remote, local_path
from data.sources.parts import cut, limited
from data.sources.records import Part
from data.sources.sets import HUB, hub_revision, is_set
from data.store.manifest import file_sha256
from data.system import disk
from recipes.schema.credentials import without_credentials
from recipes.schema.data import CHAT_TEMPLATES, DataConfig
from recipes.schema.errors import DataError, refuse
from recipes.schema.foreign import read_json
from recipes.schema.rules import source_problems

PLAN = "plan.json"
_NONE = "-"
"""In place of a digest: the split of every text follows from its digest."""
_PREPARED_FIELDS = ("path", "format", "text_field", "template", "config", "split", "streaming", "on_bad_record",
                    "max_record_bytes", "max_expansion", "max_bytes")  # fmt: skip
_CHAT_FIELDS = ("kind", "messages_field", "tools_field")
_TOKENIZER_FIELDS = ("path", "vocab_size", "end_of_document", "special_tokens", "pattern", "rank_offset", "keep_vocab",
                     "train_bytes")  # fmt: skip


@dataclass(frozen=True)
class SourceWork:
    """The work of one source."""

    shards: list[list[Part]]
    """Parts of each shard; of a Megatron set, one part that names it."""
    heldout: str
    """Digest of a text that is always held out, so that the split is not empty; empty for a Megatron set."""
    train: str
    """The same for training; empty if the source is a single document, which is cut in two."""

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
    """The work of all sources."""

    request: dict[str, Any]
    sources: dict[str, SourceWork]
    seen: dict[str, str] = field(default_factory=dict)
    """`stamp_of` of the sources that have one, when the plan was made."""

    @property
    def dealt(self) -> dict[str, str]:
        """Split by digest, of texts whose split does not follow from the digest; the same in every source."""
        pairs = ((split, getattr(work, split)) for work in self.sources.values() for split in ("heldout", "train"))
        return {known: split for split, known in pairs if known not in ("", _NONE)}


def request_of(config: DataConfig) -> dict[str, Any]:
    """The fields the prepared files depend on."""
    sources = {name: _picked(asdict(source), _PREPARED_FIELDS) for name, source in config.sources.items()}
    for name, source in config.sources.items():
        sources[name]["path"] = without_credentials(source.path)
        if source.heldout_fraction is not None:
            sources[name]["heldout_fraction"] = source.heldout_fraction
        if source.kind == "chat":
            sources[name] |= _picked(asdict(source), _CHAT_FIELDS)
    tokenizer = _picked(asdict(config.tokenizer), _TOKENIZER_FIELDS)
    if config.tokenizer.begin_of_document is not None:
        tokenizer["begin_of_document"] = config.tokenizer.begin_of_document
    path = config.tokenizer.path
    if path is not None and Path(path).is_file():
        tokenizer["sha256"] = file_sha256(Path(path))
    request: dict[str, Any] = {
        "sources": sources,
        "tokenizer": tokenizer,
        "heldout_fraction": config.heldout_fraction,
        "seed": config.seed,
        "shard_bytes": config.shard_bytes,
    }
    if config.chats:
        request["chat"] = asdict(config.chat) | {"row_tokens": config.row_tokens}
        if config.chat.template in CHAT_TEMPLATES or Path(config.chat.template).is_file():
            digest = hashlib.sha256(template_source(config.chat.template).encode()).hexdigest()
            request["chat"]["template_sha256"] = digest
    plain: dict[str, Any] = json.loads(json.dumps(request))
    return plain


def plan_work(config: DataConfig, folder: Path, *, say: Callable[[str], None] = lambda line: None) -> Work:
    """The plan of a folder: that of another task or an earlier run, or a new one, which is stored. Reads the beginning of each
    source, and `max_bytes` of those that have it.

    Raises DataError for sources without files or text, and for a folder begun with another request.
    """
    request = request_of(config)
    path = folder / PLAN
    if path.exists():
        try:
            raw = read_json(path, most_bytes=1 << 30)
            sources = {name: _source_work(entry) for name, entry in raw["sources"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {error!r}. Remove {folder} and prepare again.") from error
        same_request(folder, raw["request"], request)
        _check_sets(folder, config, raw.get("seen", {}))
        work = Work(request, sources, raw.get("seen", {}))
        if request != raw["request"]:  # settings that cannot change what is finished
            disk.write_text(path, json.dumps(asdict(work)), is_own=True)
        return work
    work = Work(request, {}, {name: stamp for name in config.sources if (stamp := stamp_of(config, name))})
    for name in config.sources:
        is_far = config.sources[name].streaming or is_remote(config.sources[name].path)
        work.sources[name] = again_where_far(is_far, lambda name=name: _plan_source(config, name, work.dealt, say))  # type: ignore[misc]
    disk.write_text(path, json.dumps(asdict(work)), is_own=True)
    return work


def read_stamps(folder: Path) -> dict[str, str]:
    """`seen` of a folder's plan; empty without a plan."""
    try:
        return dict(read_json(folder / PLAN, most_bytes=1 << 30).get("seen", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _check_sets(folder: Path, config: DataConfig, seen: Mapping[str, str]) -> None:
    """Refuse to continue with a set that changed since the plan: its rows are known by number only."""
    for name, source in config.sources.items():
        stamp = stamp_of(config, name) if name in seen and is_set(source) else None
        if stamp is not None and stamp != seen[name]:
            raise DataError(
                f"the set {source.path} (data.sources.{name}) changed while {folder} was being prepared. Prepare into another "
                f"data.folder."
            )


def stamp_of(config: DataConfig, name: str) -> str | None:
    """State of a source, to notice changes: the revision of a set of the Hub, or a digest of the names, sizes and times of change
    of files on this machine. None if neither can be found out."""
    source = config.sources[name]
    path = source.path.removeprefix(HUB) if is_set(source) else source.path
    if is_remote(path):
        return None
    if is_set(source) and not Path(path).exists():
        return hub_revision(source)
    try:
        if source.format == "megatron":
            files = [
                f"{part.file}.{kind}" for part in find_sets(f"data.sources.{name}", source) for kind in ("bin", "idx")
            ]
        else:
            files = [file.name for file in find_files(f"data.sources.{name}", path)]
        facts = [(file, *_facts(local_path(file))) for file in files]
    except (DataError, OSError):
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _facts(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def same_request(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to mix the work of two requests. DataError names what changed."""
    asked = _settled(there, asked)
    if there == asked:
        return
    changed = ", ".join(_differences(there, asked, ""))
    raise DataError(
        f"{folder} holds data prepared differently ({changed} changed). Nothing was overwritten: choose another "
        f"data.folder, or remove {folder}."
    )


def _settled(there: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """A request with the values of an earlier one in fields that cannot change finished shards.

    A shard that was finished while bad records were errors has none, so it is what skipping them, or a higher limit, would
    have made. `max_expansion` only ever refuses. The files of a tokenizer and a chat template may be gone by now.
    """
    same = copy.deepcopy(asked)
    if not {"sha256"} <= (there["tokenizer"].keys() & same["tokenizer"].keys()):
        same["tokenizer"].pop("sha256", None)
        if "sha256" in there["tokenizer"]:
            same["tokenizer"]["sha256"] = there["tokenizer"]["sha256"]
    if "chat" in there and "chat" in same and "template_sha256" not in same["chat"]:
        same["chat"] |= {key: there["chat"][key] for key in ("template_sha256",) if key in there["chat"]}
    for name in there["sources"].keys() & same["sources"].keys():
        old, new = there["sources"][name], same["sources"][name]
        new["max_expansion"] = old["max_expansion"]
        if old["on_bad_record"] == "error":
            new["on_bad_record"] = "error"
            if new["max_record_bytes"] > old["max_record_bytes"]:
                new["max_record_bytes"] = old["max_record_bytes"]
    return same


def _plan_source(config: DataConfig, name: str, dealt: Mapping[str, str], say: Callable[[str], None]) -> SourceWork:
    source, place = config.sources[name], f"data.sources.{name}"
    refuse(source_problems(config, name), DataError)
    if source.format == "megatron":
        return SourceWork([[part] for part in find_sets(place, source)], heldout="", train="")
    hidden: list[str] = []
    shards = limited(place, source, cut(place, source, config.shard_bytes, hidden=hidden))
    if hidden:
        say(f"{name}: left out {len(hidden):,} files and folders whose names begin with a dot, e.g. {hidden[0]}")
    fraction = config.heldout_of(name)
    if fraction == 1:
        return SourceWork(shards, heldout=_NONE, train=_NONE)
    heldout, train = first_two(name, source, shards, seed=config.seed, fraction=fraction, dealt=dealt)
    return SourceWork(shards, heldout=heldout, train=train)


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

"""The plan of a folder of data, made once: which parts make which shard, and the texts whose split is fixed.

    plan.json    request (the recipe fields that the content depends on), and per source the parts of each shard

Every task and every restart reads the same plan. This is why the bytes do not depend on which process made which shard.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.chat.template import template_source
from data.make.corpus import first_of_each_split
from data.make.megatron_sets import find_sets
from data.sources.files import find_files, is_remote, local_path, retry_if_remote
from data.sources.parts import cut, limited
from data.sources.records import Part
from data.sources.sets import HUB, hub_revision, is_set
from data.store.manifest import file_sha256
from data.system import disk
from recipes.schema.credentials import without_credentials
from recipes.schema.data import CHAT_TEMPLATES, DataConfig
from recipes.schema.data_rules import source_problems
from recipes.schema.errors import DataError, refuse
from recipes.schema.foreign import read_json

PLAN = "plan.json"
_NONE = "-"
"""Stored instead of a digest for a source without fixed texts: every text of it is held out."""
_PREPARED_FIELDS = ("path", "format", "text_field", "template", "config", "split", "streaming", "on_bad_record",
                    "max_record_bytes", "max_expansion", "max_bytes")  # fmt: skip
_KIND_FIELDS = {
    "chat": ("kind", "messages_field", "tools_field"),
    "preference": ("kind", "tools_field"),
    "media": ("kind", "parts_field"),
}
"""More fields of sources of other kinds than text."""
_TOKENIZER_FIELDS = ("path", "vocab_size", "end_of_document", "special_tokens", "pattern", "rank_offset", "keep_vocab",
                     "train_bytes")  # fmt: skip


@dataclass(frozen=True)
class SourcePlan:
    """The shards to make of one source, and its two texts whose split is fixed."""

    shards: list[list[Part]]
    """Parts of each shard. A Megatron set is one shard of one part, which names the set."""
    heldout: str
    """Digest of a text that is always held out, so that the split is not empty. An empty string for a Megatron set."""
    train: str
    """Digest of a text that is always trained on. An empty string for a Megatron set, and for a single document (cut in two)."""

    @property
    def bytes(self) -> int:
        """Stored bytes of the files, or of the tables of a `datasets` set on disk."""
        whole = {part.file: part.file_size or 0 for group in self.shards for part in group}
        return sum(whole.values()) or sum(part.size for group in self.shards for part in group)

    @property
    def files(self) -> int:
        """Number of files, or sets."""
        return len({part.file for group in self.shards for part in group})


@dataclass(frozen=True)
class FolderPlan:
    """The plan of all sources, as `plan.json` stores it."""

    request: dict[str, Any]
    sources: dict[str, SourcePlan]
    seen: dict[str, str] = field(default_factory=dict)
    """`stamp_of` each source when the plan was made, for the sources that have one."""

    @property
    def fixed_splits(self) -> dict[str, str]:
        """{digest: split} of the texts whose split does not follow from the digest. It is valid for the texts of every source."""
        pairs = ((split, getattr(plan, split)) for plan in self.sources.values() for split in ("heldout", "train"))
        return {text_digest: split for split, text_digest in pairs if text_digest not in ("", _NONE)}


def request_of(config: DataConfig) -> dict[str, Any]:
    """The recipe fields that the prepared files depend on."""
    sources = {name: _picked(asdict(source), _PREPARED_FIELDS) for name, source in config.sources.items()}
    for name, source in config.sources.items():
        sources[name]["path"] = without_credentials(source.path)
        if source.heldout_fraction is not None:
            sources[name]["heldout_fraction"] = source.heldout_fraction
        sources[name] |= _picked(asdict(source), _KIND_FIELDS.get(source.kind, ()))
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
    if config.conversations:
        request["chat"] = asdict(config.chat) | {"row_tokens": config.row_tokens}
        if config.chat.template in CHAT_TEMPLATES or Path(config.chat.template).is_file():
            digest = hashlib.sha256(template_source(config.chat.template).encode()).hexdigest()
            request["chat"]["template_sha256"] = digest
    if config.media_sources:
        request["media"] = asdict(config.media) | {"row_tokens": config.row_tokens}
    plain: dict[str, Any] = json.loads(json.dumps(request))
    return plain


def plan_folder(config: DataConfig, folder: Path, *, say: Callable[[str], None] = lambda line: None) -> FolderPlan:
    """The folder's stored plan if it has one, otherwise a new one, which is stored.

    A new plan reads the beginning of each source, and the first `max_bytes` of sources that set it. Raises DataError for
    sources without files or text, and for a folder that was begun with another request.
    """
    request = request_of(config)
    path = folder / PLAN
    if path.exists():
        try:
            raw = read_json(path, most_bytes=1 << 30)
            sources = {name: _source_work(entry) for name, entry in raw["sources"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {error!r}. Remove {folder} and prepare again.") from error
        refuse_other_request(folder, raw["request"], request)
        _check_sets(folder, config, raw.get("seen", {}))
        plan = FolderPlan(request, sources, raw.get("seen", {}))
        if request != raw["request"]:  # only settings that cannot change finished shards
            disk.write_text(path, json.dumps(asdict(plan)), is_own=True)
        return plan
    plan = FolderPlan(request, {}, {name: stamp for name in config.sources if (stamp := stamp_of(config, name))})
    for name in config.sources:
        is_from_server = config.sources[name].streaming or is_remote(config.sources[name].path)
        plan_source = functools.partial(_plan_source, config, name, plan.fixed_splits, say)
        plan.sources[name] = retry_if_remote(is_from_server, plan_source)
    disk.write_text(path, json.dumps(asdict(plan)), is_own=True)
    return plan


def read_stamps(folder: Path) -> dict[str, str]:
    """`seen` of the stored plan. Empty without a plan."""
    try:
        return dict(read_json(folder / PLAN, most_bytes=1 << 30).get("seen", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _check_sets(folder: Path, config: DataConfig, seen: Mapping[str, str]) -> None:
    """DataError if a set changed since the plan. Its rows are known by number only, so new rows would take their places."""
    for name, source in config.sources.items():
        stamp = stamp_of(config, name) if name in seen and is_set(source) else None
        if stamp is not None and stamp != seen[name]:
            raise DataError(
                f"the set {source.path} (data.sources.{name}) changed while {folder} was being prepared. Prepare into another "
                f"data.folder."
            )


def stamp_of(config: DataConfig, name: str) -> str | None:
    """A text that changes when a source changes: the revision of a set on the Hub, or a digest of the names, sizes and
    modification times of files on this machine. None if neither is known."""
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
            files = [file.name for file in find_files(f"data.sources.{name}.path", path)]
        facts = [(file, *_facts(local_path(file))) for file in files]
    except (DataError, OSError):
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _facts(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def refuse_other_request(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """DataError, naming the changed fields, if a folder was begun with another request than the wanted one."""
    wanted = _without_harmless_changes(stored, wanted)
    if stored == wanted:
        return
    changed = ", ".join(_differences(stored, wanted, ""))
    raise DataError(
        f"{folder} contains data prepared differently ({changed} changed). Nothing was overwritten: choose another "
        f"data.folder, or remove {folder}."
    )


def _without_harmless_changes(stored: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted request, with the stored values in fields whose change cannot affect finished shards.

    on_bad_record, max_record_bytes: while bad records are errors, a finished shard has none, so skipping them or raising the
    limit would give the same shard. max_expansion can only refuse a file. The tokenizer's or the chat
    template's file may no longer exist, and then its checksum is not known.
    """
    same = copy.deepcopy(wanted)
    if not {"sha256"} <= (stored["tokenizer"].keys() & same["tokenizer"].keys()):
        same["tokenizer"].pop("sha256", None)
        if "sha256" in stored["tokenizer"]:
            same["tokenizer"]["sha256"] = stored["tokenizer"]["sha256"]
    if "chat" in stored and "chat" in same and "template_sha256" not in same["chat"]:
        same["chat"] |= {key: stored["chat"][key] for key in ("template_sha256",) if key in stored["chat"]}
    for name in stored["sources"].keys() & same["sources"].keys():
        old, new = stored["sources"][name], same["sources"][name]
        new["max_expansion"] = old["max_expansion"]
        if old["on_bad_record"] == "error":
            new["on_bad_record"] = "error"
            if new["max_record_bytes"] > old["max_record_bytes"]:
                new["max_record_bytes"] = old["max_record_bytes"]
    return same


def _plan_source(
    config: DataConfig, name: str, fixed_splits: Mapping[str, str], say: Callable[[str], None]
) -> SourcePlan:
    source, place = config.sources[name], f"data.sources.{name}"
    refuse(source_problems(config, name), DataError)
    if source.format == "megatron":
        return SourcePlan([[part] for part in find_sets(place, source)], heldout="", train="")
    hidden: list[str] = []
    shards = limited(place, source, cut(place, source, config.shard_bytes, hidden=hidden))
    if hidden:
        say(f"{name}: left out {len(hidden):,} files and folders whose names begin with a dot, e.g. {hidden[0]}")
    fraction = config.heldout_of(name)
    if fraction == 1:
        return SourcePlan(shards, heldout=_NONE, train=_NONE)
    heldout, train = first_of_each_split(
        name, source, shards, seed=config.seed, fraction=fraction, fixed_splits=fixed_splits
    )
    return SourcePlan(shards, heldout=heldout, train=train)


def _source_work(raw: dict[str, Any]) -> SourcePlan:
    shards = [[Part(**part) for part in group] for group in raw["shards"]]
    return SourcePlan(shards, heldout=raw["heldout"], train=raw["train"])


def _picked(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _differences(stored: Any, wanted: Any, where: str) -> list[str]:
    """Dotted names of the values that differ."""
    if not isinstance(stored, dict) or not isinstance(wanted, dict):
        return [where] if stored != wanted else []
    dotted = f"{where}." if where else ""
    return [
        difference
        for key in sorted(stored.keys() | wanted.keys())
        for difference in _differences(stored.get(key), wanted.get(key), f"{dotted}{key}")
    ]

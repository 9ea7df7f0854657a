"""Facts about a folder of prepared data for `recipes.schema.rules`, read without opening a shard.

    manifest.json, tokenizer --> Prepared(vocabulary, fingerprints, problems: sources, rows, order, special tokens)

Prompts are read through pyarrow and fsspec, which take half a second to import, so only recipes with prompts import them.
`open_dataset` calls the same functions, so that the planner and the trainer refuse the same data. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data.order.blend import Blend, blend_of
from data.rows.fim import fim_problems
from data.store.manifest import DESCRIBED, MANIFEST, SPLITS, Manifest, TokenizerEntry, file_sha256, read_manifest
from data.tokenizer import Tokenizer, load_tokenizer
from recipes.schema.credentials import without_credentials
from recipes.schema.data import DataConfig, is_remote
from recipes.schema.data_rules import data_problems
from recipes.schema.errors import DataError, Problem
from recipes.schema.facts import Prepared, not_prepared
from recipes.schema.recipe import Recipe

if TYPE_CHECKING:
    from data.chat.prompts import PromptSet


def read_prepared(config: DataConfig, *, rows: int, global_rows: int) -> Prepared | None:
    """Facts about the prepared data in `config.folder`, for a run of `rows` rows, `global_rows` a step. None for a URL.

    Sizes of all files are compared with the manifest. No shard is opened.
    """
    folder = Path(config.folder)
    if is_remote(config.folder):
        return None
    if not (folder / MANIFEST).is_file():
        return not_prepared(config.folder)
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return Prepared(problems=(Problem("data.folder", str(error)),))
    found = source_problems(config, manifest)
    try:
        tokenizer = tokenizer_of(folder / manifest.tokenizer.file, manifest.tokenizer, config)
        found += fim_problems(config.fim, special=tokenizer.special)
    except DataError as error:
        found.append(Problem("data.tokenizer", str(error)))
    found += row_problems(config, manifest)
    exhausted: Sequence[tuple[str, int]] = ()
    identity = ""
    if not found and not data_problems(config):  # the rules report what is wrong in the recipe itself
        try:
            blend = blend_of(config, source_rows(config, manifest))
            identity = identity_of(manifest, blend)
            exhausted = blend.exhausted(rows)
            blend.check_length(rows, global_rows=global_rows)
        except DataError as error:
            found.append(Problem("data.sources", str(error)))
    return Prepared(
        vocab_size=manifest.tokenizer.vocab_size,
        tokenizer=manifest.tokenizer.fingerprint,
        hash=identity,
        problems=tuple(found),
        exhausted=tuple(exhausted),
    )


def identity_of(manifest: Manifest, blend: Blend) -> str:
    """Identity of the data and of the order that positions refer to."""
    if blend.order == 1:
        return manifest.hash
    return hashlib.sha256(f"{manifest.hash} in order {blend.order}".encode()).hexdigest()


def tokenizer_of(path: Path, entry: TokenizerEntry, config: DataConfig) -> Tokenizer:
    """The folder's tokenizer. DataError if its bytes are not those of the tokenizer the shards were made with."""
    if path.is_file() and file_sha256(path) != entry.sha256:
        raise DataError(f"{path} is not the tokenizer the shards were made with. Prepare the data again.")
    return load_tokenizer(path, config.tokenizer, known_fingerprint=entry.fingerprint)


def source_problems(config: DataConfig, manifest: Manifest) -> list[Problem]:
    """Problems with sources: one is missing in the folder, or documents begin with another token than the recipe says."""
    found = []
    tokenizer = manifest.request.get("tokenizer", {})
    stored, configured = tokenizer.get("begin_of_document"), config.tokenizer.begin_of_document
    if tokenizer and stored != configured:
        text = (
            f"the documents of {without_credentials(config.folder)} begin with {stored or 'no special token'}, but "
            f"data.tokenizer.begin_of_document={configured or 'null'}."
        )
        remedy = f"Set it to {stored or 'null'}, or prepare the data again, into another data.folder."
        found.append(Problem("data.tokenizer.begin_of_document", text, remedy))
    chat = manifest.request.get("chat")
    if config.conversations and chat is not None and chat["row_tokens"] != config.row_tokens:
        text = (
            f"the {'chats' if config.chats else 'preferences'} of {without_credentials(config.folder)} are packed in rows of "
            f"{chat['row_tokens']:,} tokens, and data.row_tokens={config.row_tokens:,}."
        )
        remedy = f"Set data.row_tokens={chat['row_tokens']}, or prepare the data again, into another data.folder."
        found.append(Problem("data.row_tokens", text, remedy))
    media = manifest.request.get("media")
    if config.media_sources and media is not None:
        wanted = asdict(config.media) | {"row_tokens": config.row_tokens}
        for key in (key for key in wanted if key in media and media[key] != wanted[key]):
            field = "data.row_tokens" if key == "row_tokens" else f"data.media.{key}"
            text = (
                f"the media of {without_credentials(config.folder)} were prepared with {field}={media[key]}, and the recipe has "
                f"{wanted[key]}."
            )
            remedy = f"Set {field}={media[key]}, or prepare the data again, into another data.folder."
            found.append(Problem(field, text, remedy))
    for name, source in config.sources.items():
        there = manifest.sources.get(name)
        prepared_as = next((kind for kind, key in DESCRIBED.items() if there and key in there.description), "text")
        if there is not None and prepared_as != source.kind:
            text = (
                f"source {name!r} of {without_credentials(config.folder)} was prepared as {DESCRIBED.get(prepared_as, 'text')}, "
                f"and data.sources.{name}.kind={source.kind}."
            )
            remedy = "Set its kind as it was, or prepare the data again, into another data.folder."
            found.append(Problem(f"data.sources.{name}.kind", text, remedy))
    missing = [name for name in config.sources if name not in manifest.sources]
    if not missing:
        return found
    text = f"{without_credentials(config.folder)} has no source {', '.join(missing)} (it has {', '.join(manifest.sources)})."
    remedy = "Prepare the data again, or take the source out of data.sources."
    return [*found, Problem(f"data.sources.{missing[0]}", text, remedy)]


def row_problems(config: DataConfig, manifest: Manifest) -> list[Problem]:
    """Problems with splits of sources that are shorter than one row."""
    found = []
    for name in config.sources:
        for split in SPLITS if name in manifest.sources else ():
            tokens = manifest.sources[name].count(split, "tokens")
            if tokens // config.row_tokens == 0 and not (split == "train" and config.heldout_of(name) == 1):
                text = (
                    f"the {split} part of source {name!r} has {tokens:,} tokens, fewer than one row of "
                    f"data.row_tokens={config.row_tokens}."
                )
                more = ", or raise its heldout_fraction" if split == "heldout" else ""
                remedy = f"Lower data.row_tokens, or add text{more}."
                found.append(Problem("data.row_tokens", text, remedy))
    return found


def source_rows(config: DataConfig, manifest: Manifest) -> list[int]:
    """Number of training rows of each source, in the recipe's order: as `data.rows.packing.Rows.count`, without a shard."""
    return [manifest.sources[name].count("train", "tokens") // config.row_tokens for name in config.sources]


def read_material(recipe: Recipe, *, checks: bool) -> Prepared | None:
    """Facts about what a run learns from: prepared data, or prompts. None for prepared data behind a URL.

    checks: also render every prompt, so that a bad one is found now.
    """
    if recipe.objective.kind == "grpo":
        return _prompt_facts(recipe, checks=checks)
    rows = recipe.run.global_rows
    return read_prepared(recipe.data, rows=recipe.run.steps * rows, global_rows=rows)


def _prompt_facts(recipe: Recipe, *, checks: bool) -> Prepared:
    if not recipe.objective.grpo.prompts:  # a rule of the recipe reports it
        return Prepared(is_here=False)
    from data.chat.prompts import FIELD  # start-up: see above
    from data.sources.files import find_files  # likewise

    try:
        for path in recipe.objective.grpo.prompts:
            find_files(FIELD, path)
        tokenizer, _ = tokenizer_or_file(recipe.data)
    except DataError as error:
        return Prepared(is_here=False, problems=(Problem(FIELD, str(error)),))
    try:
        with open_prompts(recipe, tokenizer, checks=checks) as found:
            return Prepared(vocab_size=found.vocab_size, tokenizer=tokenizer.fingerprint, hash=found.manifest_hash)
    except DataError as error:
        return Prepared(problems=(Problem(FIELD, str(error)),))


def open_prompts(recipe: Recipe, tokenizer: Tokenizer, *, checks: bool = False) -> PromptSet:
    """The prompts of a recipe (`objective.grpo`). checks: see `read_material`. Close it. Raises DataError."""
    from data.chat.prompts import PromptSet  # start-up: see above

    config = recipe.objective.grpo
    most = recipe.data.row_tokens - config.max_answer_tokens
    answer = f"objective.grpo.max_answer_tokens={config.max_answer_tokens}"
    return PromptSet(recipe.data, config.prompts, tokenizer, answer=answer, most_tokens=most, checks=checks)


def tokenizer_or_file(config: DataConfig) -> tuple[Tokenizer, Path]:
    """(tokenizer, its file): of the prepared data, or the recipe's own if no data is prepared. DataError without one."""
    folder = Path(config.folder)
    if not (folder / MANIFEST).is_file() and config.tokenizer.path is not None:
        return load_tokenizer(Path(config.tokenizer.path), config.tokenizer), Path(config.tokenizer.path)
    entry = read_manifest(folder).tokenizer
    return load_tokenizer(folder / entry.file, config.tokenizer), folder / entry.file

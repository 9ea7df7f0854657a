"""Files of an imported directory other than weights: stored next to the checkpoint, and written again on export.

    a directory --store--> IMPORT/published/   config, generation config, tokenizer files, chat template, licence, notices
    IMPORT/published/ --carried_config, restore--> the exported directory

Export rewrites a config field only if the model changed since the import (pruned, extended, another vocabulary or format).
All other fields are exported unchanged, including those that this project does not know.
"""

import shutil
from pathlib import Path
from typing import Any

from recipes.schema.errors import CheckpointError, RecipeError
from recipes.schema.foreign import parse_yaml, read_bounded, read_bounded_text
from recipes.schema.model import ModelConfig
from train.checkpoint.manifest import Manifest, read_manifest
from train.hf.config import CONFIG, NO_CLAMP, SpecialTokens, from_config, read_config, to_config
from train.hf.tokens import CONFIG as TOKENIZER_CONFIG
from train.hf.tokens import GENERATION_CONFIG, PIECES, TOKENIZER

PUBLISHED = "published"
"""Name of the folder next to an imported checkpoint."""
_TEMPLATES = "additional_chat_templates"
_TOKENIZER_FILES = (
    TOKENIZER, PIECES, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_PAPERS = ("license", "licence", "notice", "use_policy", "copying")
_CARD = "README.md"
_CARD_FIELDS = ("license", "license_name", "license_link", "language", "datasets", "base_model")
_MOST_BYTES = 1 << 30
"""Size of the largest file that is stored, a tokenizer for example."""
_SPELLINGS = {
    "hybrid_override_pattern": ("layers_block_type",),
    "rope_parameters": ("rope_scaling", "rope_theta"),
    "rope_theta": ("rope_parameters", "rope_scaling"),
    "head_dim": ("attention_head_dim",),
    "torch_dtype": ("dtype",),
}
"""Other names of a field: a new value replaces all of them."""


def store(directory: Path, folder: Path) -> None:
    """Copy config, tokenizer, licence and card of a directory into `folder`/published; no weights, no code.

    RecipeError for a link that leaves the directory: what is stored is exported, and perhaps uploaded, later.
    """
    target = folder / PUBLISHED
    target.mkdir()
    names = (CONFIG, GENERATION_CONFIG, _CARD, *_TOKENIZER_FILES)
    wanted = [path for path in sorted(directory.iterdir()) if path.name in names or _is_paper(path)]
    for path in wanted:
        if not path.is_dir():
            _copy(path, target / path.name, directory)
    for path in sorted((directory / _TEMPLATES).glob("*.jinja")):
        (target / _TEMPLATES).mkdir(exist_ok=True)
        _copy(path, target / _TEMPLATES / path.name, directory)


def _copy(path: Path, target: Path, directory: Path) -> None:
    """Copy a regular file of at most `_MOST_BYTES`. The hub's cache links each file to ../../blobs, which is allowed."""
    root, target_of_link = directory.resolve(), path.resolve()
    is_blob = root.parent.name == "snapshots" and target_of_link.is_relative_to(root.parent.parent / "blobs")
    if not (is_blob or target_of_link.is_relative_to(root)):
        raise RecipeError(f"{path} is a link out of {directory}. Replace it by the file itself, or remove it.")
    try:
        target.write_bytes(read_bounded(path, most_bytes=_MOST_BYTES))
    except OSError as error:
        raise RecipeError(f"{path} cannot be copied: {error}. Copy the directory again.") from error


def _is_paper(path: Path) -> bool:
    return path.name.lower().startswith(_PAPERS)


def import_of(lineage: dict[str, Any]) -> dict[str, Any] | None:
    """The lineage that the import of a checkpoint's weights wrote, also for weights pruned since; None if not imported."""
    inner: Any = lineage
    while isinstance(inner, dict) and "imported_from" not in inner:
        inner = inner.get("before")  # pruning stores the lineage of its parent
    return inner if isinstance(inner, dict) else None


def published_of(checkpoint: Path, manifest: Manifest) -> Path | None:
    """The folder that `store` wrote for a checkpoint, or for one that its weights come from; None without one."""
    waiting, seen = [(checkpoint, manifest)], {checkpoint}
    while waiting:
        path, current = waiting.pop(0)
        found = path.parent / PUBLISHED
        if import_of(current.lineage) is None:
            continue
        if (found / CONFIG).is_file():
            return found
        for key in ("started_from", "parent", "resharded_from"):
            origin = Path(str(current.lineage.get(key, "")))
            if key not in current.lineage or origin in seen:
                continue
            seen.add(origin)
            try:
                waiting.append((origin, read_manifest(origin)))
            except (CheckpointError, OSError):
                continue  # it was deleted since
    return None


def is_untouched(manifest: Manifest) -> bool:
    """Whether the weights are still those of the import, without training."""
    return "imported_from" in manifest.lineage and manifest.step == 0 and "started_from" not in manifest.lineage


def carried_config(
    published: Path, model: ModelConfig, *, dtype: str, vocab: int, max_positions: int | None, untouched: bool
) -> dict[str, Any]:
    """config.json of an imported model: the published one, with the fields that changed since replaced.

    dtype: torch's name of the stored format. max_positions: a new length, None keeps the published one. untouched: whether the
    weights are still the published ones; training here has no lower bound on dt, so the config of trained weights has none.
    """
    config = read_config(published)
    before = from_config(config, where=str(published / CONFIG))
    common = {"tokens": SpecialTokens(None, None, None), "max_positions": 1, "dtype": dtype}
    then, now = (to_config(m, vocab=vocab, **common) for m in (before, model))  # type: ignore[arg-type]
    changes = {key: value for key, value in now.items() if then.get(key) != value}
    if config["vocab_size"] != vocab:
        changes["vocab_size"] = vocab
    if max_positions is not None:
        changes["max_position_embeddings"] = max_positions
    stored = config.get("torch_dtype", config.get("dtype"))
    if stored != dtype:
        changes["dtype" if "dtype" in config else "torch_dtype"] = dtype
    if not untouched and config["model_type"] == "nemotron_h":
        changes["time_step_min"] = NO_CLAMP
    for key in changes:
        for other in _SPELLINGS.get(key, ()):
            if other not in changes:
                config.pop(other, None)
    return config | changes


def restore(published: Path, folder: Path, *, tokenizer: bool) -> None:
    """Copy licence, notices and the generation config into an exported folder; tokenizer: also the unchanged tokenizer
    files."""
    for path in sorted(published.iterdir()):
        if _is_paper(path) or path.name == GENERATION_CONFIG or (tokenizer and path.name in _TOKENIZER_FILES):
            shutil.copyfile(path, folder / path.name)
        elif tokenizer and path.name == _TEMPLATES:
            shutil.copytree(path, folder / path.name)
        elif path.name == _CARD:
            shutil.copyfile(path, folder / "README.published.md")


def card_fields(published: Path) -> dict[str, Any]:
    """Licence, languages and origin from the front matter of a published model card; empty if it has none."""
    try:
        parts = read_bounded_text(published / _CARD).split("---", 2)
        head = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except (OSError, ValueError):
        return {}
    fields = {key: head[key] for key in _CARD_FIELDS if key in head} if isinstance(head, dict) else {}
    return {key: value for key, value in fields.items() if _is_text(value)}


def _is_text(value: Any) -> bool:
    """Whether a value is a text or a list of texts, as the hub's fields are."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def max_length_of(published: Path) -> int | None:
    """The published `max_position_embeddings`."""
    value = read_config(published).get("max_position_embeddings")
    return value if isinstance(value, int) else None

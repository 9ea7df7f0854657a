"""Files of an imported directory other than weights: stored next to the checkpoint, and written again on export.

    a directory --keep--> IMPORT/published/   config, generation config, tokenizer files, chat template, licence, notices
    IMPORT/published/ --carried_config, give_back--> the exported directory

Export rewrites a config field only if the model changed since the import (pruned, extended, another vocabulary or format).
All other fields are exported unchanged, including those that this project does not know.
"""

import shutil
from pathlib import Path
from typing import Any

from recipes.schema.foreign import parse_yaml, read_bounded_text, read_json
from recipes.schema.model import ModelConfig
from train.checkpoint.manifest import Manifest
from train.hf.config import CONFIG, NO_CLAMP, SpecialTokens, from_config, read_config, to_config

PUBLISHED = "published"
"""Name of the folder next to an imported checkpoint."""
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
)  # fmt: skip
_PAPERS = ("license", "licence", "notice", "use_policy", "copying")
_GENERATION = "generation_config.json"
_CARD_FIELDS = ("license", "license_name", "license_link", "language", "datasets", "base_model")
_SPELLINGS = {
    "hybrid_override_pattern": ("layers_block_type",),
    "rope_parameters": ("rope_scaling", "rope_theta"),
    "rope_theta": ("rope_parameters", "rope_scaling"),
    "head_dim": ("attention_head_dim",),
    "torch_dtype": ("dtype",),
}
"""Other names of a field: a new value replaces all of them."""


def keep(directory: Path, folder: Path) -> None:
    """Copy config, tokenizer, licence and card of a directory into `folder`/published; no weights, no code."""
    target = folder / PUBLISHED
    target.mkdir()
    names = (CONFIG, _GENERATION, "README.md", *_TOKENIZER_FILES)
    for path in sorted(directory.iterdir()):
        if path.name in names or path.name.lower().startswith(_PAPERS):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)


def published_of(checkpoint: Path, manifest: Manifest) -> Path | None:
    """The folder that `keep` wrote for a checkpoint, or for the checkpoint its run started from; None if there is none."""
    places = [checkpoint.parent]
    if "started_from" in manifest.lineage:
        places.append(Path(manifest.lineage["started_from"]).parent)
    if "imported_from" not in manifest.lineage:
        return None
    return next((place / PUBLISHED for place in places if (place / PUBLISHED / CONFIG).is_file()), None)


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
    changes = {key: value for key, value in now.items() if then[key] != value}
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


def give_back(published: Path, folder: Path, *, tokenizer: bool) -> None:
    """Copy licence, notices and the generation config into an exported folder; tokenizer: also the unchanged tokenizer
    files."""
    for path in sorted(published.iterdir()):
        is_paper = path.name.lower().startswith(_PAPERS) or path.name == _GENERATION
        if is_paper or (tokenizer and path.name in _TOKENIZER_FILES):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)
        elif path.name == "README.md":
            shutil.copyfile(path, folder / "README.published.md")


def card_fields(published: Path) -> dict[str, Any]:
    """Licence, languages and origin from the front matter of a published model card; empty if it has none."""
    try:
        parts = read_bounded_text(published / "README.md").split("---", 2)
        head = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except (OSError, ValueError):
        return {}
    return {key: head[key] for key in _CARD_FIELDS if key in head} if isinstance(head, dict) else {}


def max_length_of(published: Path) -> int | None:
    """The published `max_position_embeddings`."""
    value = read_json(published / CONFIG).get("max_position_embeddings")
    return value if isinstance(value, int) else None

"""A small two-source data configuration for tests."""

from pathlib import Path

from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig

VOCAB = 300


def config_of(root: Path, **changes: object) -> DataConfig:
    """A two-source configuration over files that `texts` writes."""
    fields: dict[str, object] = {
        "folder": str(root / "prepared"),
        "sources": {
            "verse": SourceConfig(path=str(root / "verse"), weight=0.75),
            "code": SourceConfig(path=str(root / "code.jsonl"), weight=0.25, text_field="content"),
        },
        "tokenizer": TokenizerConfig(vocab_size=VOCAB),
        "row_tokens": 16,
        "heldout_fraction": 0.2,
        "workers": 1,
    }
    return DataConfig(**{**fields, **changes})  # type: ignore[arg-type]

"""A small two-source data configuration for tests, its texts, and its overrides of the smoke recipe."""

from pathlib import Path

from rich.console import Console

from data.prepare import prepare
from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig

VOCAB = 300


def config_of(root: Path, **changes: object) -> DataConfig:
    """A two-source configuration over the files of `write_texts`."""
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


def write_texts(root: Path) -> Path:
    """Twelve text files and 180 records of code, which `config_of` names. -> root."""
    (root / "verse").mkdir(parents=True)
    for index in range(12):
        lines = [f"line {index} {n}: the quick brown fox über {n * index} naïve dogs\n" for n in range(20)]
        (root / "verse" / f"{index:02d}.txt").write_text("".join(lines))
    records = [f'{{"content": "def f{n}(x):\\n    return x + {n}\\n", "id": {n}}}\n' * 3 for n in range(60)]
    (root / "code.jsonl").write_text("".join(records))
    return root


def prepared_in(root: Path, **changes: object) -> DataConfig:
    """The configuration over the files in `root`, prepared."""
    config = config_of(root, **changes)
    prepare(config, console=Console(quiet=True))
    return config


def overrides_of(config: DataConfig) -> list[str]:
    """Overrides that make the smoke recipe read this data."""
    sources = [f"~data.sources.{name}" for name in ("shakespeare", "python")]
    for name, source in config.sources.items():
        fields = {"path": source.path, "weight": source.weight, "text_field": source.text_field}
        sources += [f"+data.sources.{name}.{key}={value}" for key, value in fields.items()]
    data = [
        f"data.folder={config.folder}", f"data.tokenizer.vocab_size={VOCAB}", f"data.row_tokens={config.row_tokens}",
        f"data.heldout_fraction={config.heldout_fraction}",
    ]  # fmt: skip
    return [*sources, *data]

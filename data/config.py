"""Every recipe field of the `data` group, typed and documented. Standard library only: it runs on a login node.

The text under a field is its documentation: meaning, unit, and why the default (docs/recipes.md is made from it).
"""

from dataclasses import dataclass, field
from typing import Literal

from data.fields import OpenFraction, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class SourceConfig:
    """One named source of documents; its name is its key under `data.sources`."""

    path: str
    """File, folder or glob of text; `.gz` and `.zst` are read as they are. `package:NAME` is a corpus shipped with
    this project (data/corpora), `python-stdlib` the standard library sources of the running Python."""
    weight: PositiveFloat = 1.0
    """Share of training rows drawn from this source, relative to the other weights (they need not sum to 1)."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """How a file is read; `auto` goes by the file's name. A text file is one document."""
    text_field: str = "text"
    """Field of a jsonl or parquet record that holds the text."""
    max_bytes: PositiveInt | None = None
    """Stop after about this many bytes of text (whole documents); null reads everything."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer turns text into token ids."""

    path: str | None = None
    """A `tokenizer.json` to load; null trains a byte-level BPE on the sources and keeps it beside the shards."""
    vocab_size: PositiveInt = 4096
    """Size of the trained vocabulary, special tokens included. Checked against `model.vocab`."""
    end_of_document: str = "<|endoftext|>"
    """Special token written after every document."""


@dataclass(frozen=True)
class DataConfig:
    """From raw text to rows of tokens."""

    folder: str = "runs/data/smoke"
    """Where prepared shards, tokenizer and manifest lie (written by `python -m data.prepare`)."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name. At least one."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer of all sources."""
    row_tokens: PositiveInt = 256
    """Tokens of a row: the sequence length of training."""
    heldout_fraction: OpenFraction = 0.02
    """Share of each source's documents kept out of training for evaluation; at least one document per source."""
    reset_at_documents: bool = False
    """Mask attention and reset Mamba states where a document ends inside a row. Off: a row is one stream of text."""
    seed: int = 1234
    """Seed of the order of rows and of the held-out split; change it and the data order changes."""
    workers: PositiveInt = 2
    """Processes that tokenize. The output does not depend on it."""
    prefetch_steps: PositiveInt = 2
    """Steps of batches read ahead by a thread."""

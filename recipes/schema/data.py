"""Every recipe field of the `data` group, typed and documented. Standard library only: it runs on a login node.

The text under a field is its documentation: meaning, unit, and why the default (docs/recipes.md is made from it).
"""

from dataclasses import dataclass, field
from typing import Literal

from recipes.schema.fields import Count, Fraction, NonNegativeFloat, OpenFraction, PositiveFloat, PositiveInt, Seed

CHAT_TEMPLATES = ("chatml", "gemma2", "nemotron_nano_v2", "turns", "plain")
"""Chat templates that come with this project (data/chat/templates)."""


def is_remote(folder: str) -> bool:
    """Whether a folder is a URL."""
    return "://" in folder


@dataclass(frozen=True)
class SourceConfig:
    """One named source of documents; its name is its key under `data.sources`."""

    path: str
    """File, folder or glob of text, here or behind `s3://`, `gs://`, `https://`, `hf://` (any fsspec protocol); `.gz`,
    `.zst`, `.bz2`, `.xz` are decompressed, names that begin with a dot are left out of folders, `{000..063}` and `{a,b}` stand
    for several paths. `hf:NAME` is a Hugging Face `datasets` set. `package:NAME` is a corpus shipped with this project
    (data/corpora), `python-stdlib` the standard library sources of the running Python."""
    kind: Literal["text", "chat"] = "text"
    """`text`: documents, every token of which is learned. `chat`: records with messages, of which the assistant's are learned
    (`data.chat`, docs/align.md)."""
    weight: NonNegativeFloat = 1.0
    """Share of training rows drawn from this source, relative to the other weights (they need not sum to 1). 0 keeps it
    for later phases, or for evaluation only."""
    max_epochs: PositiveFloat | None = None
    """Most times the source may be read through; `data.on_exhausted` says what then. null: no limit. Up to 4 repeats cost
    little (arXiv 2305.16264)."""
    heldout_fraction: Fraction | None = None
    """Share of this source's documents kept out of training for evaluation, at least one; null: `data.heldout_fraction`.
    1: all of them, a source for evaluation only (with weight 0)."""
    format: Literal["auto", "text", "jsonl", "parquet", "csv", "tsv", "dataset", "megatron"] = "auto"
    """How it is read; `auto` goes by the file's name, and refuses names that do not tell. A text file is one document; `csv`
    and `tsv` are tables whose first line names the columns; `dataset` is a folder written by
    `save_to_disk`; `megatron` reads existing `.bin/.idx` sets where they lie (path without suffix, or a glob)."""
    text_field: str = "text"
    """Field of a record that holds the text; `a.b` looks inside the group `a`."""
    messages_field: str = "messages"
    """Field with the messages of a chat: a list of `{role, content}`, or that list as JSON."""
    tools_field: str = "tools"
    """Field with the functions that the assistant of a chat may call; a record need not have it."""
    template: str | None = None
    """Text made of several fields, such as `"{title}\\n{body}"`; takes the place of text_field."""
    config: str | None = None
    """Configuration of a Hugging Face set, such as `sample-10BT`."""
    split: str = "train"
    """Split of a Hugging Face set that is read; what is held out for evaluation is taken from it."""
    streaming: bool = False
    """Read a Hugging Face set as a stream instead of downloading it first."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that is no JSON, no UTF-8, too large, or without text: stop and name it, or leave it out and count it."""
    max_record_bytes: PositiveInt = 67_108_864
    """A larger record is a bad record: no single document may fill the memory."""
    max_expansion: PositiveInt = 200
    """A file that decompresses to more than this times its size (beyond 64 MiB) is refused. Text expands 3 to 20 times."""
    max_bytes: PositiveInt | None = None
    """Stop after about this many bytes of text (whole documents); null reads everything."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer turns text into token ids."""

    path: str | None = None
    """A tokenizer to load: `tokenizer.json`, SentencePiece `.model`, tekken or tiktoken file; null trains a byte-level BPE
    on the sources. Either way it is stored with the shards."""
    vocab_size: PositiveInt = 4096
    """Size of the trained vocabulary, special tokens included. Checked against `model.vocab`."""
    end_of_document: str = "<|endoftext|>"
    """Special token written after every document."""
    begin_of_document: str | None = None
    """Special token written before every document and put before a prompt, for models trained with one (Gemma, Llama:
    `<bos>`, `<|begin_of_text|>`); null: none. `hf import` sets it from the model's own tokenizer."""
    special_tokens: dict[str, int] = field(default_factory=dict)
    """Further special tokens and their ids, for a trained tokenizer (ids from 1 up) or a file of ranks that names none."""
    pattern: str | None = None
    """Regular expression that cuts a text before tokens are made, or one of gpt2, cl100k, o200k, nemotron; for a trained
    tokenizer (null: gpt2) and for files of ranks without one."""
    rank_offset: Count = 0
    """Id of the first token of a file of ranks without special tokens (Nemotron's: 1000)."""
    keep_vocab: PositiveInt | None = None
    """Use only the ids below this of a file of ranks; null: what the file says, or all."""
    train_bytes: PositiveInt = 1_000_000_000
    """Bytes of text a trained tokenizer looks at, taken from the beginning of each source in equal parts."""
    encoder: Literal["auto", "tokenizers"] = "auto"
    """`auto` encodes a `tokenizer.json` with tiktoken where that provably gives the same ids, several times faster."""


@dataclass(frozen=True)
class PhaseConfig:
    """A later part of training with other weights (Nemotron Nano 2 changes them at 60 % and 90 % of 20T tokens)."""

    from_tokens: PositiveInt
    """Training tokens after which the phase starts; rounded up to a whole row."""
    weights: dict[str, NonNegativeFloat]
    """Weight by source; sources left out are not drawn."""
    ramp_tokens: Count = 0
    """Tokens over which shares move linearly from those before to these; 0 switches at once."""


@dataclass(frozen=True)
class FimConfig:
    """Fill in the middle (arXiv 2207.14255): some documents are shown as prefix, suffix, middle."""

    rate: Fraction = 0.0
    """Share of the documents in a row that are rearranged; 0 turns it off."""
    spm_rate: Fraction = 0.5
    """Share of those that come as suffix, prefix, middle."""
    prefix: str = "<|fim_prefix|>"
    """Special token before the prefix."""
    suffix: str = "<|fim_suffix|>"
    """Special token before the suffix."""
    middle: str = "<|fim_middle|>"
    """Special token before the middle."""


@dataclass(frozen=True)
class ChatConfig:
    """Sources of `kind: chat`: from messages to tokens, and which of them are learned (docs/align.md)."""

    template: str = "chatml"
    """A Jinja file (a model's `chat_template.jinja`), or one of chatml, gemma2, nemotron_nano_v2, turns, plain. What the
    assistant wrote is marked with `{% generation %}`; without it, it is found by rendering the chat up to each answer."""
    packing: Literal["rows", "single"] = "rows"
    """`rows`: whole chats together in a row, the rest of it filled with end-of-document tokens that are not learned. `single`:
    each chat in a row of its own (Nemotron Nano 2's second stage)."""
    long_record: Literal["refuse", "drop", "cut"] = "refuse"
    """A chat longer than `data.row_tokens`: stop and name it; leave it out and count it; or keep its beginning."""
    earlier_thinking: Literal["drop", "keep"] = "drop"
    """`drop`: a chat with thinking in an earlier turn becomes a sequence for each user turn, without the thinking of earlier
    turns, of which the last turn is learned (Nemotron 3). `keep`: one sequence with all of it."""
    strip_thinking_fraction: Fraction = 0.0
    """Share of the chats whose thinking is removed, so that the model also answers without (Nemotron Nano 2: 0.1)."""
    stripped_thinking: str = ""
    """What an answer begins with in place of removed thinking (Nemotron Nano 2: `<think></think>`)."""
    cut_thinking_fraction: Fraction = 0.0
    """Share of the chats whose thinking is cut short, with the answer kept, for budget control (Nemotron 3: 0.03)."""
    cut_thinking_min: PositiveInt = 1000
    """Fewest tokens that are left of thinking that is cut."""
    cut_thinking_max: PositiveInt = 2000
    """Most tokens that are left of it; the number is drawn for each chat."""
    think_start: str = "<think>"
    """Marker before thinking that stands in an answer's content."""
    think_end: str = "</think>"
    """Marker after it."""


@dataclass(frozen=True)
class CacheConfig:
    """Shards behind a URL, kept on local disk while they are read."""

    folder: str = "runs/cache"
    """Where copies lie; all processes of a machine share it."""
    gib: PositiveFloat = 64.0
    """Disk the copies may take, in GiB; those unused for longest go first. Must hold `shuffle_shards` shards of every
    source at once, or shards are fetched again and again."""
    fetch_threads: Count = 2
    """Shards fetched at the same time, ahead of the rows that need them, as many as `gib` holds; 0: each when it is needed."""
    retries: Count = 5
    """Attempts after a failed transfer, with a growing pause (1, 2, 4, ... seconds)."""


@dataclass(frozen=True)
class DataConfig:
    """From raw text to rows of tokens."""

    folder: str = "runs/data/smoke"
    """Where prepared shards, tokenizer and manifest lie (written by `stratum prepare`). Reading also takes a URL
    (`s3://`, `gs://`, `https://`, ...): shards are then copied to `cache.folder` as they are needed."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name. At least one. The order in which they are written decides nothing."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer of all sources."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """Sources of chats."""
    row_tokens: PositiveInt = 256
    """Tokens of a row: the sequence length of training."""
    heldout_fraction: OpenFraction = 0.02
    """Share of each source's documents kept out of training for evaluation; at least one document per source. A source may
    have its own."""
    packing: Literal["chunk", "best_fit"] = "chunk"
    """`chunk` cuts the stream of documents every `row_tokens`; `best_fit` arranges the documents of a stretch of 64 rows so
    that few are cut (arXiv 2404.10830). Either way rows are full and every token is a label once."""
    fim: FimConfig = field(default_factory=FimConfig)
    """Fill in the middle."""
    reset_at_documents: bool = False
    """Mask attention and reset Mamba states where a document ends inside a row. Off: a row is one stream of text."""
    phases: tuple[PhaseConfig, ...] = ()
    """Curriculum after the start, in order; the start has the sources' own weights."""
    on_exhausted: Literal["error", "continue"] = "error"
    """A source would be read more than its max_epochs: refuse the run before it starts, naming the step; or go on from there
    with the other sources, in proportion to their weights (a function of the position, like all of the order)."""
    shuffle_shards: Count = 0
    """0: any row of a source may follow any other. n: rows are shuffled within n shards at a time, those drawn at random;
    for shards behind a URL, or on disks that seek slowly."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Checksums when data is opened. `auto`: files not checked before, up to 4 GiB, and any file that changed since;
    `always`: every file; `never`: sizes only. `stratum inspect --verify` checks all, once."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Local copies of remote shards."""
    stall_warning_s: PositiveFloat = 30.0
    """Say which file is waited for when no rows came for this long, and again every so often."""
    stall_limit_s: PositiveFloat = 480.0
    """Stop with an error that names the file after this long; below `launch.timeout_s`, so that it is known why."""
    seed: Seed = 1234
    """Seed of the order of rows and of the held-out split; change it and the data order changes."""
    workers: PositiveInt = 2
    """Processes that tokenize. The output does not depend on it."""
    shard_bytes: PositiveInt = 268_435_456
    """Input files are grouped, and large ones cut where their format allows, to shards of about this many stored bytes. A
    shard is what one process makes in one go, and what is made again after a kill."""
    prefetch_steps: PositiveInt = 2
    """Steps of batches read ahead."""
    read_threads: PositiveInt = 1
    """Threads that read them; more help where files are far away."""

    def __post_init__(self) -> None:
        """Sources are in the order of their names: the order in which a recipe lists them decides nothing."""
        object.__setattr__(self, "sources", dict(sorted(self.sources.items())))

    @property
    def chats(self) -> list[str]:
        """Names of the sources of chats."""
        return [name for name, source in self.sources.items() if source.kind == "chat"]

    def heldout_of(self, name: str) -> float:
        """Share of a source's documents that is held out."""
        fraction = self.sources[name].heldout_fraction
        return self.heldout_fraction if fraction is None else fraction

"""Fields of the `data` group: sources, tokenizer, and the order and packing of rows.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
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
    """One named source of documents. Its name is its key under `data.sources`."""

    path: str
    """File, folder or glob of text, local or behind `s3://`, `gs://`, `https://`, `hf://` (any fsspec protocol). `.gz`, `.zst`,
    `.bz2` and `.xz` are decompressed. In folders, names that begin with a dot are left out. `{000..063}` and `{a,b}` stand for
    several paths. `hf:NAME` is a Hugging Face `datasets` set, `package:NAME` a corpus shipped with this project (data/corpora),
    `python-stdlib` the source code of the running Python's standard library."""
    kind: Literal["text", "chat", "preference", "media"] = "text"
    """`text`: documents, every token of which is learned. `chat`: records with messages, of which the assistant's are learned
    (`data.chat`, docs/align.md). `preference`: records with a context and ranked answers to it, for `objective=dpo`. `media`:
    records of text, images, audio and video in any order, of which the text is learned (`data.media`, docs/multimodal.md)."""
    weight: NonNegativeFloat = 1.0
    """Share of training rows drawn from this source, relative to the other weights (they need not sum to 1). 0: only later
    phases or evaluation use it."""
    max_epochs: PositiveFloat | None = None
    """How many times the source may be read in full, at most; `data.on_exhausted` says what happens then. null: no limit. Up to 4
    repeats cost little (arXiv 2305.16264)."""
    heldout_fraction: Fraction | None = None
    """Fraction of this source's documents held out of training for evaluation, at least one; null: `data.heldout_fraction`.
    1: all of them, for a source that is only evaluated (with weight 0)."""
    format: Literal["auto", "text", "jsonl", "parquet", "csv", "tsv", "webdataset", "dataset", "megatron"] = "auto"
    """Format of the files. `auto`: by the file's name; other names are refused. `text`: a file is one document. `csv`, `tsv`: the
    first line names the columns. `webdataset`: tar files of samples, for `kind: media`. `dataset`: a folder written by
    `save_to_disk`. `megatron`: existing `.bin/.idx` sets, read in place (path without suffix, or a glob)."""
    text_field: str = "text"
    """Field of a record that contains the text; `a.b` is field `b` of the nested record `a`."""
    messages_field: str = "messages"
    """Field with the messages of a chat: a list of `{role, content}`, or that list as JSON."""
    tools_field: str = "tools"
    """Field with the functions that the assistant of a chat may call; a record need not have it."""
    parts_field: str = "content"
    """Field with the parts of a media record: a list such as `[{type: text, text: ...}, {type: image, path: ...}]`. Records
    without it have `text_field` and `image(s)`, `audio(s)`, `video(s)`."""
    template: str | None = None
    """Text made of several fields, such as `"{title}\\n{body}"`. Used instead of text_field."""
    config: str | None = None
    """Configuration of a Hugging Face set, such as `sample-10BT`."""
    split: str = "train"
    """Split of a Hugging Face set to read. Held-out documents are taken from it too."""
    streaming: bool = False
    """Read a Hugging Face set as a stream instead of downloading it first."""
    on_bad_record: Literal["error", "skip"] = "error"
    """If a record is not JSON, not UTF-8, too large, or has no text: stop and name it, or leave it out and count it."""
    max_record_bytes: PositiveInt = 67_108_864
    """A larger record counts as bad, so that no single document fills the memory."""
    max_expansion: PositiveInt = 200
    """A file that decompresses to more than this times its size (beyond 64 MiB) is refused. Text expands 3 to 20 times."""
    max_bytes: PositiveInt | None = None
    """Stop after about this many bytes of text (whole documents); null reads everything."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer turns text into token ids."""

    path: str | None = None
    """A tokenizer to load: `tokenizer.json`, SentencePiece `.model`, tekken or tiktoken file; null: train a byte-level BPE on the
    sources. In both cases it is stored with the shards."""
    vocab_size: PositiveInt = 4096
    """Size of the trained vocabulary, special tokens included. Checked against `model.vocab`."""
    end_of_document: str = "<|endoftext|>"
    """Special token written after every document."""
    begin_of_document: str | None = None
    """Special token written before every document and put before a prompt, for models trained with one (Gemma, Llama:
    `<bos>`, `<|begin_of_text|>`); null: none. `hf import` sets it from the model's own tokenizer."""
    special_tokens: dict[str, int] = field(default_factory=dict)
    """More special tokens and their ids, for a trained tokenizer (ids from 1 on) or a file of ranks without special tokens."""
    pattern: str | None = None
    """Regular expression that cuts a text into pieces before tokens are made, or one of gpt2, cl100k, o200k, nemotron. Used for a
    trained tokenizer (null: gpt2) and for files of ranks without a pattern."""
    rank_offset: Count = 0
    """Id of the first token of a file of ranks without special tokens (Nemotron's: 1000)."""
    keep_vocab: PositiveInt | None = None
    """Use only the ids below this number of a file of ranks; null: the number in the file, or all ids."""
    train_bytes: PositiveInt = 1_000_000_000
    """Bytes of text to train a tokenizer on: the same amount from the beginning of each source."""
    encoder: Literal["auto", "tokenizers"] = "auto"
    """`auto`: encode a `tokenizer.json` with tiktoken, several times faster, if it provably gives the same ids."""


@dataclass(frozen=True)
class PhaseConfig:
    """A later part of training with other weights (Nemotron Nano 2 changes them at 60 % and 90 % of 20T tokens)."""

    from_tokens: PositiveInt
    """Training tokens after which the phase starts, rounded up to a whole row."""
    weights: dict[str, NonNegativeFloat]
    """Weight of each source. A source that is left out is not drawn."""
    ramp_tokens: Count = 0
    """Tokens over which shares change linearly from those of the phase before to these; 0: at once."""


@dataclass(frozen=True)
class FimConfig:
    """Fill in the middle (arXiv 2207.14255): some documents are rearranged to prefix, suffix, middle."""

    rate: Fraction = 0.0
    """Fraction of the documents in a row that are rearranged; 0: off."""
    spm_rate: Fraction = 0.5
    """Fraction of the rearranged documents with the order suffix, prefix, middle."""
    prefix: str = "<|fim_prefix|>"
    """Special token before the prefix."""
    suffix: str = "<|fim_suffix|>"
    """Special token before the suffix."""
    middle: str = "<|fim_middle|>"
    """Special token before the middle."""


@dataclass(frozen=True)
class ChatConfig:
    """Sources of `kind: chat` and `kind: preference`: from messages to tokens, and which of them are learned (docs/align.md)."""

    template: str = "chatml"
    """A Jinja file (a model's `chat_template.jinja`), or one of chatml, gemma2, nemotron_nano_v2, turns, plain. What the
    assistant wrote is marked with `{% generation %}`; without it, it is found by rendering the chat up to each answer."""
    packing: Literal["rows", "single"] = "rows"
    """`rows`: whole chats together in a row, the rest of it filled with end-of-document tokens that are not learned. `single`:
    each chat in a row of its own (Nemotron Nano 2's second stage)."""
    long_record: Literal["refuse", "drop", "cut"] = "refuse"
    """A chat longer than `data.row_tokens`: stop and name it; leave it out and count it; or keep its beginning. The answers of a
    preference count together, and the longest are cut."""
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
class MediaConfig:
    """Sources of `kind: media`: what images, audio and video become in a row, and the limits of what is decoded
    (docs/multimodal.md). Prepared data records all of it."""

    patch: PositiveInt = 16
    """Side of a square patch, in pixels. One patch is one position of the row (SigLIP 2: 16)."""
    image_patches: PositiveInt = 256
    """Most patches of an image. An image is scaled, at its aspect ratio, to the largest grid of whole patches within it
    (SigLIP 2's NaFlex, arXiv 2502.14786; NaViT, arXiv 2307.06304)."""
    video_patches: PositiveInt = 64
    """The same for one frame of a video (Gemini 2.5: 66 positions a frame)."""
    frames_per_second: PositiveFloat = 1.0
    """Frames of a video that are read, by time, from its first frame on (Gemini: 1)."""
    video_frames: PositiveInt = 64
    """Most frames of a video. Those of a longer one are spread evenly over it."""
    mels: Literal[80, 128] = 80
    """Mel bands of audio at 16 kHz, in frames of 10 ms (Whisper, arXiv 2212.04356: 80, large-v3: 128)."""
    audio_stride: PositiveInt = 8
    """Frames of audio that become one position of the row. 8: 80 ms (Nemotron 3 Nano Omni's encoder; Whisper: 2)."""
    audio_seconds: PositiveFloat = 30.0
    """Longest clip (Whisper: 30). A longer one is a bad record."""
    video_seconds: PositiveFloat = 600.0
    """Longest video. A longer one is a bad record."""
    most_pixels: PositiveInt = 89_478_485
    """Most pixels of an image or frame, compared before it is decoded, because a small file can decode to gigabytes (the default
    is Pillow's limit)."""
    image_token: str = "<|image|>"
    """Special token that holds the place of each patch of an image or frame."""
    audio_token: str = "<|audio|>"
    """Special token that holds the place of each `audio_stride` frames of audio."""
    long_record: Literal["refuse", "drop"] = "refuse"
    """A record longer than `data.row_tokens`: stop and name it, or leave it out and count it. Records are never cut."""


@dataclass(frozen=True)
class CacheConfig:
    """Local copies of shards behind a URL."""

    folder: str = "runs/cache"
    """Folder of the copies, shared by all processes of a machine."""
    gib: PositiveFloat = 64.0
    """Disk space for the copies, in GiB. If it is full, the least recently used are removed. It must be enough for
    `shuffle_shards` shards of every source, otherwise shards are fetched again and again."""
    fetch_threads: Count = 2
    """Shards fetched at the same time before rows need them, as far as `gib` allows; 0: fetch a shard when a row needs it."""
    retries: Count = 5
    """Attempts after a failed transfer, after pauses of 1, 2, 4, ... seconds."""


@dataclass(frozen=True)
class DataConfig:
    """From raw text to rows of tokens."""

    folder: str = "runs/data/smoke"
    """Folder of the prepared shards, tokenizer and manifest (written by `stratum prepare`). For reading it may be a URL (`s3://`,
    `gs://`, `https://`, ...). Shards are then copied to `cache.folder` when they are needed."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name, at least one. Their order has no effect."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer of all sources."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """Sources of chats."""
    media: MediaConfig = field(default_factory=MediaConfig)
    """Sources of media."""
    row_tokens: PositiveInt = 256
    """Tokens of a row: the sequence length of training."""
    heldout_fraction: OpenFraction = 0.02
    """Fraction of each source's documents held out of training for evaluation, at least one document per source. A source may set
    its own fraction."""
    packing: Literal["chunk", "best_fit"] = "chunk"
    """`chunk` cuts the stream of documents every `row_tokens`; `best_fit` arranges the documents of each 64 successive rows so
    that few are cut (arXiv 2404.10830). In both cases rows are full and every token is a label once."""
    fim: FimConfig = field(default_factory=FimConfig)
    """Fill in the middle."""
    reset_at_documents: bool = False
    """Mask attention and reset Mamba states where a document ends inside a row. false: a row is one continuous text."""
    phases: tuple[PhaseConfig, ...] = ()
    """Later phases of training, in order. Before the first one, the sources' own weights count."""
    on_exhausted: Literal["error", "continue"] = "error"
    """If the run would read a source more often than its max_epochs: `error` refuses the run before it starts and names the step;
    `continue` uses the other sources from there on, in proportion to their weights (a function of the position, like the whole
    order)."""
    shuffle_shards: Count = 0
    """0: shuffle all rows of a source together. n: shuffle the rows of n random shards at a time, for shards behind a URL or on
    disks that seek slowly."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Which checksums are compared when data is opened. `auto`: files not checked before, up to 4 GiB, and any file that changed
    since. `always`: every file. `never`: only sizes are compared. `stratum inspect --verify` checks all files once."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Local copies of remote shards."""
    stall_warning_s: PositiveFloat = 30.0
    """After this long without rows, warn and name the file that is waited for; repeat the warning at this interval."""
    stall_limit_s: PositiveFloat = 480.0
    """After this long without rows, stop and name the file. Less than `launch.timeout_s`, so that this message comes first."""
    seed: Seed = 1234
    """Seed of the order of rows and of the held-out split. Another seed is another data order."""
    workers: PositiveInt = 2
    """Processes that tokenize. The output does not depend on it."""
    shard_bytes: PositiveInt = 268_435_456
    """Stored input bytes of one shard, approximately: small files are grouped, and large ones cut if their format allows. A
    shard is made by one process, and made again as a whole after a kill."""
    prefetch_steps: PositiveInt = 2
    """Steps of batches read ahead."""
    read_threads: PositiveInt = 1
    """Threads that read them. More threads help if files are on slow or remote disks."""

    def __post_init__(self) -> None:
        """Sort the sources by name, so that their order in the recipe has no effect."""
        object.__setattr__(self, "sources", dict(sorted(self.sources.items())))

    @property
    def chats(self) -> list[str]:
        """Names of the sources of chats."""
        return [name for name, source in self.sources.items() if source.kind == "chat"]

    @property
    def preferences(self) -> list[str]:
        """Names of the sources of preferences."""
        return [name for name, source in self.sources.items() if source.kind == "preference"]

    @property
    def conversations(self) -> list[str]:
        """Names of the sources whose records have messages, which the chat template renders."""
        return [name for name, source in self.sources.items() if source.kind in ("chat", "preference")]

    @property
    def media_sources(self) -> list[str]:
        """Names of the sources whose records have images, audio or video."""
        return [name for name, source in self.sources.items() if source.kind == "media"]

    def heldout_of(self, name: str) -> float:
        """Fraction of a source's documents that is held out."""
        fraction = self.sources[name].heldout_fraction
        return self.heldout_fraction if fraction is None else fraction

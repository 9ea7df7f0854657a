"""Time and peak memory of conversion: a model of any recipe's shape, made of constants, to Hugging Face's files and back.

    python -m tests.bench.conversion nemotron_nano_9b_v2 runs/conversion      needs twice the model's size on disk

Every step runs in a separate process, so that peaks of memory are measured separately; the folder is removed at the end.
"""

import argparse
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

import train.megatron  # noqa: F401  readies Megatron before anything imports it
from recipes.schema.command import RECIPES
from recipes.schema.model import ModelConfig
from recipes.schema.typed import build
from train.checkpoint.manifest import RunState
from train.checkpoint.storage import publish
from train.checkpoint.tensors import StoredTensor, StoredTensors, write_weights
from train.hf.config import family_of
from train.hf.convert import export_weights, import_weights
from train.hf.files import WeightFiles
from train.hf.mapping import pairs


def alone(name: str, work: Callable[[], object]) -> None:
    """Run `work` in a fork. -> its duration and its peak of memory."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            start = time.monotonic()
            work()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(f"| {name} | {time.monotonic() - start:.1f} s | {peak / 1e9:.2f} GB |", flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the parent tidies up
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"{name} ended with {os.waitstatus_to_exitcode(status)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of recipes/model")
    parser.add_argument("folder", type=Path, help="scratch folder to make")
    parsed = parser.parse_args()
    model = build(ModelConfig, yaml.safe_load((RECIPES / "model" / f"{parsed.model}.yaml").read_text()), "model")
    found = pairs(model, family_of(model))
    weights = {
        name: StoredTensor(shape, torch.float32 if pair.full else torch.bfloat16)
        for pair in found
        for name, shape in pair.ours.items()
    }
    whole, largest = sum(entry.nbytes for entry in weights.values()), max(entry.nbytes for entry in weights.values())
    print(f"{parsed.model}: {whole / 1e9:.2f} GB in bf16, largest tensor {largest / 1e9:.2f} GB\n")
    print("| step | time | peak memory of its process |\n|---|---|---|")
    folder = parsed.folder
    for name in ("writing", "theirs", "back"):
        (folder / name).mkdir(parents=True)

    def make() -> None:
        write_weights(
            folder / "writing",
            weights,
            lambda name: torch.full(weights[name].shape, hash(name) % 97 / 97, dtype=weights[name].dtype),
        )
        publish(folder / "writing", folder / "ours", RunState())

    try:
        alone("nothing", lambda: None)
        alone("make a checkpoint", make)
        alone("export", lambda: export_weights(StoredTensors(folder / "ours"), folder / "theirs", model=model))
        shutil.rmtree(folder / "ours")
        alone("import", lambda: import_weights(WeightFiles(folder / "theirs"), folder / "back", model=model))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

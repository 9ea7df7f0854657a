"""`python drive_local.py FOLDER PROCESSES [--show N] -- options of tests/simulated_train.py`: a simulated launcher."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from launch.local.command import run_to_end
from launch.runs import RunFolder
from recipes.schema.data import DataConfig, SourceConfig
from recipes.schema.launch import LaunchConfig
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe
from recipes.schema.run import RunConfig


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("processes", type=int)
    parser.add_argument("--grace", type=float, default=20.0)
    parser.add_argument("--show", type=int, default=1)
    parser.add_argument("--warm", action="append", default=[], help="fork the ranks from a process with this module")
    parser.add_argument("--least", type=int, help="launch.least_processes")
    parser.add_argument("--regrow", type=float, default=3600.0, help="launch.regrow_s")
    parser.add_argument("words", nargs="*")
    own = parser.parse_args()
    recipe = Recipe(
        run=RunConfig(name=own.folder.name, folder=str(own.folder.parent), steps=20, microbatch_rows=1),
        model=ModelConfig(pattern="M", hidden=8, vocab=8),
        data=DataConfig(sources={"none": SourceConfig(path="none")}),
        launch=replace(
            LaunchConfig(), restarts=2, backoff_s=0.2, grace_s=own.grace, least_processes=own.least, regrow_s=own.regrow
        ),
    )
    return run_to_end(
        [sys.executable, "-m", "launch.local.rank", "simulated_train", str(own.folder), *own.words],
        recipe=recipe,
        run=RunFolder(own.folder),
        processes=own.processes,
        environment=dict(os.environ),
        shown=frozenset(range(own.show)),
        modules=own.warm,
    )


if __name__ == "__main__":
    sys.exit(main())

"""`stratum prepare | inspect | trace`: help text and options of each command. The work is in the module of the same name.

That module is imported after the command line was checked, because NumPy, pyarrow and torch take seconds to import.
"""

from collections.abc import Sequence

from omegaconf import DictConfig

from recipes.schema.command import dotted_keys, run_tool
from recipes.schema.data import DataConfig
from recipes.schema.errors import DataError
from recipes.schema.options import CommandParser
from recipes.schema.tools import InspectConfig, PrepareConfig, TraceConfig


def prepare(arguments: Sequence[str]) -> int:
    """Entry point of `stratum prepare`."""

    def job(config: PrepareConfig, composed: DictConfig) -> int:
        _refuse_prompts(composed)
        from data.prepare import prepare_recipe  # NumPy and pyarrow take seconds; --help and mistakes do not need them

        return prepare_recipe(config.task, composed)

    parser = CommandParser(
        "prepare",
        about="""
Turn a recipe's data.sources into token shards in data.folder, with a manifest of checksums.
Run it again after any interruption: finished shards are kept, and the result has the same bytes.
""",
        examples=r"""
stratum prepare -cn smoke                          everything on this machine
stratum prepare -cn smoke data.workers=2           on two processes; same bytes
stratum prepare -cn smoke --cfg job                print the composed recipe, make nothing
stratum prepare -cn smoke data.folder=runs/data/mine '~data.sources' \
    '+data.sources.mine={path: "texts/*.jsonl", text_field: body}'       texts of your own
""",
        notes="""
As an array job, start every task with the same folder on a shared file system. Any number of tasks gives the same bytes.
  --task 3/16    the fourth of 16 tasks, counted from 0: every 16th shard. The last task to finish writes the manifest
  --task plan    optional, first: decide which parts make which shard, and train the tokenizer; otherwise the tasks do it
  --task merge   optional, last: check that every shard exists and write the manifest
`stratum launch slurm -cn RECIPE --prepare --tasks 16` writes and submits such a job. `stratum fields data` lists the fields.
""",
        recipe=True,
    )
    keys = dotted_keys(DataConfig, "data.")
    return run_tool(parser, arguments, PrepareConfig, job, keys=keys, user_errors=(DataError,))


def inspect(arguments: Sequence[str]) -> int:
    """Entry point of `stratum inspect`."""

    def job(config: InspectConfig, composed: DictConfig) -> int:
        _refuse_prompts(composed)
        from data.inspect import inspect  # torch takes seconds: as above

        return inspect(config, composed)

    parser = CommandParser(
        "inspect",
        about="What prepared data contains: counts, lengths, shares, packing, samples, and a picture of document lengths.",
        examples="""
stratum inspect -cn smoke                          tables, samples, and lengths.png in the data's folder
stratum inspect -cn smoke --verify                 also read every file and compare it with its checksum, once
stratum inspect runs/smoke --samples 0 --picture lengths.png       the data of a run
""",
        recipe=True,
    )
    keys = dotted_keys(DataConfig, "data.")
    return run_tool(parser, arguments, InspectConfig, job, keys=keys, user_errors=(DataError,))


def trace(arguments: Sequence[str]) -> int:
    """Entry point of `stratum trace`."""

    def job(config: TraceConfig, composed: DictConfig) -> int:
        _refuse_prompts(composed)
        from data.trace import trace  # as above

        return trace(config, composed)

    parser = CommandParser(
        "trace",
        about="""
Which documents a training step saw, and at which steps a document was or will be seen.
Needs the prepared data and the recipe; rows that a run left out after a spike are read from its newest checkpoint.
Steps count as in metrics.jsonl, from 1.
""",
        examples="""
stratum trace -cn smoke --step 123                     sources, files, documents and their text, row by row
stratum trace runs/smoke --step 2 --rows 2 --chars 2000    two rows of it, with more text
stratum trace runs/smoke --file hamlet.txt --record 0  when a record of a source file was trained on
stratum trace -cn smoke --source python --document 17  the same, by number in the source's stream
stratum trace -cn smoke --step 123 --json              for scripts
""",
        recipe=True,
    )
    keys = dotted_keys(DataConfig, "data.")
    return run_tool(parser, arguments, TraceConfig, job, keys=keys, user_errors=(DataError,))


def _refuse_prompts(composed: DictConfig) -> None:
    """DataError for a recipe without sources that learns from its own answers: it has no prepared data."""
    if composed.objective.kind == "grpo" and not composed.data.sources:
        raise DataError(
            "objective.kind=grpo learns from answers to objective.grpo.prompts, which need no preparation, and data.sources is "
            "empty. `stratum train` checks all prompts before its first step, and records samples of answers in metrics.jsonl."
        )

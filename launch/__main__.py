"""`python -m launch COMMAND ...`: plan a run before paying for it, then start it. Each command is loaded only when asked for.

A command is a function `(arguments) -> exit status` in a module of its own; nothing here knows what it does.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "doctor": (
        "launch.doctor.command:main",
        "is this machine ready? packages, GPU, driver, disk, fabric, each with its remedy",
    ),
    "plan": (
        "launch.plan.command:main",
        "memory, FLOPs, time and every recipe error, before anything is started (no torch)",
    ),
    "validate": ("launch.plan.published.command:main", "compare the planner with published throughput: ROWS.csv"),
    "local": ("launch.local.command:main", "start 1..N processes on this machine"),
    "slurm": ("launch.slurm.command:main", "write and submit a Slurm job that continues to the recipe's last step"),
    "stages": (
        "launch.stages:main",
        "the stages of a recipe (score, prune, distil, ...): print their commands, or --run them",
    ),
    "status": ("launch.status:main", "what runs are doing: Slurm job, step, time left, checkpoint, first error"),
    "logs": ("launch.logs:main", "the last lines of a run's newest logs; --follow shows new ones as they come"),
    "cancel": ("launch.slurm.cancel:main", "end a Slurm run after a save; no further job follows"),
}
"""Name -> (module:function, one line of help)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m launch`. -> the command's exit status; 2 for a command that there is not."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"Did you mean `{near[0]}`?" if near else f"There are: {', '.join(COMMANDS)}."
        sys.stderr.write(f"error: `python -m launch {name}` is no command. {hint}\n")
        return 2
    module, function = COMMANDS[name][0].split(":")
    return int(getattr(importlib.import_module(module), function)(rest))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m launch COMMAND [arguments]",
            "",
            *lines,
            "",
            "`python -m launch COMMAND --help` explains a command; `python -m recipes.schema.reference` every recipe field.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

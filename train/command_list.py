"""The commands of `stratum`. Only the standard library is imported here, so that help and errors appear at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command of `stratum`."""

    group: str
    """Heading under which the help lists it."""
    entry: str
    """`module:function`; the function takes the arguments after the command's name and returns the exit status."""
    about: str
    """One line of help."""


COMMANDS = {
    "prepare": Command("data", "data.commands:prepare", "text -> tokenizer, token shards, manifest; restartable"),
    "inspect": Command("data", "data.commands:inspect", "contents of prepared data: counts, lengths, shares, samples"),
    "trace": Command("data", "data.commands:trace", "the documents a step saw, and the steps that saw a document"),
    "train": Command("training", "train.__main__:main", "train a recipe; the same command resumes"),
    "generate": Command("training", "train.inference.command:main", "stream text from a checkpoint of a run"),
    "evaluate": Command("training", "train.evaluate.command:main", "scores of a checkpoint on tasks, with intervals"),
    "serve": Command("training", "train.serve.command:main", "a model behind OpenAI's API, with a page to try it"),
    "report": Command("training", "train.report.command:main", "a page about a run, or several side by side"),
    "replay": Command("training", "train.replay.command:main", "one step again, layer by layer, against another execution"),
    "checkpoint": Command("training", "train.checkpoint.__main__:main", "list, verify, compare and rewrite checkpoints"),
    "merge": Command("training", "train.merge.command:main", "a weighted sum of two models, or an average of checkpoints"),
    "preferences": Command("training", "train.align.preferences_command:main", "a model's own answers, judged: data for DPO"),
    "hf": Command("training", "train.hf.__main__:main", "models to and from Hugging Face's format, compared block by block"),
    "plan": Command("runs", "launch.plan.command:main", "memory, time, cost and every mistake of a run, before it starts"),
    "launch local": Command("runs", "launch.local.command:main", "1..N processes on this machine, with restarts"),
    "launch slurm": Command("runs", "launch.slurm.command:main", "a Slurm job that continues to the recipe's last step"),
    "launch kubernetes": Command("runs", "launch.kubernetes.command:main", "a JobSet that restarts to the recipe's last step"),
    "launch node": Command("runs", "launch.local.node:main", "the processes of one node of a cluster"),
    "status": Command("runs", "launch.status:main", "what runs are doing: job, step, time left, first error"),
    "logs": Command("runs", "launch.logs:main", "the last lines of a run's newest logs; --follow shows new ones"),
    "cancel": Command("runs", "launch.slurm.cancel:main", "end a Slurm run after a save; no further job follows"),
    "doctor": Command("runs", "launch.doctor.command:main", "is this machine ready? each line with its remedy"),
    "compress": Command("shapes", "train.compress.__main__:main", "score, prune, search and pick smaller shapes of a model"),
    "teacher-cache": Command("shapes", "train.teacher_cache.command:main", "store teacher logits once, to distil from them"),
    "stages": Command("shapes", "launch.stages:main", "the stages of a recipe (score, prune, distil, ...), printed or run"),
    "fields": Command("reference", "recipes.schema.reference:main", "what every recipe field means"),
    "completion": Command("reference", "train.completion:main", "completion of commands, fields and runs for bash and zsh"),
    "validate": Command("reference", "launch.plan.published.command:main", "the plan's predictions next to published throughput"),
}  # fmt: skip
"""Every command by its name; a name of two words is a command of a group (`stratum launch local`)."""

"""`python -m tests.bench.align_road` (`make align-road`): from a pretrained model to an aligned one, small, in one command.

    data --> base --+--> sft --+--> digits --+--> merged
              |     |          +--> words ---+
              |     |          +--> dpo; broken: chosen and rejected swapped
              |     |          +--> grpo; broken: advantages of zero
              |     |          +--> reward --> rlhf
              |     |          +--> gamed reward --> gamed, with and without KL
              |     +--> broken: the whole chat learned, or only what the assistant did not write
              +--> stable: no decay of the learning rate --> averaged with the weights of a decay

A hybrid of 1.4M parameters. Every stage runs `stratum` commands as a user would, leaves runs/align_road/results/STAGE.json, and
is not run again while that file exists; a run that was killed continues. At the end a table is printed. When
all stages have a result, docs/pictures/align_road.png is drawn.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from road_data import SKILLS, write_all

from data.system.figure import MUTED, SERIES, canvas

FOLDER = Path("runs/align_road")
DATA, RESULTS, SCORES = FOLDER / "data", FOLDER / "results", FOLDER / "scores"
STABLE_STEPS, BASE_STEPS = 400, 600
"""Pretraining: the learning rate decays after the first number of steps, in the run `stable` not at all."""
WINDOW_EVERY = 20
SFT_STEPS, SFT_RATE = 600, 0.002
SKILL_STEPS, SKILL_RATE = 60, 0.001
KL_BOUND = 2.0
"""Most divergence of RLHF from its start, nats per token. Set before the run: with other chats it was 1.7."""
GAMED_REWARD = [
    "tiny_align_reward", "run.name=gamed_reward", f"data.folder={FOLDER}/prepared/gamed",
    f"data.sources.rankings.path={DATA}/gamed.jsonl", "run.steps=60",
]  # fmt: skip
GAMED_KL = {"gamed_free": 1e-6, "gamed_kl": 1.0}
"""Weights of the KL term; 1e-6 only makes the run record the divergence."""
GAMED_STEPS, BROKEN_GRPO_STEPS = 40, 60
ENDS = 5
"""Batches at the beginning and at the end of a run whose rewards are averaged."""
ALPHAS = tuple(round(0.1 * tenth, 1) for tenth in range(11))

Result = dict[str, Any]


def data() -> Result:
    """Write the data of the road, and prepare pretraining and chats."""
    write_all(DATA)
    stratum("prepare", "-cn", "tiny_teacher")
    stratum("prepare", *_chats("sft", DATA / "chats.jsonl"))
    for skill in SKILLS:
        stratum("prepare", *_chats(skill, DATA / skill / "chats.jsonl"))
    for words in (["tiny_align_dpo"], ["tiny_align_reward"], GAMED_REWARD):
        stratum("prepare", "-cn", *words)
    return {}


def pretrain() -> Result:
    """The base, and from the beginning of its decay on the same steps at a constant learning rate."""
    stratum("train", *_pretraining("base"), f"checkpoint.keep_every_steps={STABLE_STEPS}")
    if not (FOLDER / "stable").exists():
        shutil.rmtree(FOLDER / ".stable", ignore_errors=True)
        shutil.copytree(FOLDER / "base", FOLDER / ".stable", ignore=_later_than_stable)
        (FOLDER / ".stable").rename(FOLDER / "stable")
    every = f"{{every_steps: {WINDOW_EVERY}, keep_every_steps: {WINDOW_EVERY}, allow: [arithmetic]}}"
    stratum("train", *_pretraining("stable"), "schedule.decay=0", f"checkpoint={every}")
    return evaluate("base", *_tasks("taught", "fresh"))


def _later_than_stable(_folder: str, names: list[str]) -> list[str]:
    """For `copytree`: all of a run except its checkpoint before the decay, and its recipe."""
    start = f"step_{STABLE_STEPS:08d}"
    return [
        name for name in names if name in ("latest", "metrics.jsonl") or (name.startswith("step_") and name != start)
    ]


def sft() -> Result:
    """Supervised fine-tuning: answers to instructions that were never trained on."""
    stratum("train", *_fine_tuning("sft", "sft", start="base", steps=SFT_STEPS, rate=SFT_RATE))
    return evaluate("sft", *_tasks("taught", "fresh", "plain", "habit", "sums"))


def broken_sft() -> Result:
    """The same with a broken mask: the whole chat is learned, or only what the assistant did not write."""
    found = {}
    for fault in ("prompt_only", "whole_chat"):
        words = _fine_tuning(f"sft_{fault}", "sft", start="base", steps=SFT_STEPS, rate=SFT_RATE)
        broken(fault, *words)
        found[fault] = evaluate(f"sft_{fault}", *_tasks("taught"))["taught"]
    return found


def skills() -> Result:
    """Two more fine-tunings of the same model, each on another skill."""
    found = {}
    for skill in SKILLS:
        stratum("train", *_fine_tuning(skill, skill, start="sft", steps=SKILL_STEPS, rate=SKILL_RATE))
    for name in ("sft", *SKILLS):
        found[name] = evaluate(name, *(DATA / skill / f"{skill}.yaml" for skill in SKILLS))
    return found


def merge() -> Result:
    """Merges of the two skills with every alpha, scored by `stratum merge`."""
    tasks = ",".join(str(DATA / skill / f"{skill}.yaml") for skill in SKILLS)
    sweep = _sweep("merged", list(SKILLS), ALPHAS, tasks)
    return {"sums": {str(alpha): parts for alpha, parts in sweep.items()}}


def windows() -> Result:
    """Averages of the checkpoints of `stable` against its last checkpoint and against the base, whose learning rate decayed."""
    found = {}
    for weights in ("minus_sqrt", "equal"):
        name = f"window_{weights}"
        if not (FOLDER / name).exists():
            window = ["--window", f"{STABLE_STEPS}:", "--weights", weights]
            stratum("merge", str(FOLDER / "stable"), "--out", str(FOLDER / name), *window)
        parts = _sweep(
            f"{name}_or_base", [name, "base"], (0.0, 1.0), "heldout"
        )  # the ends of a sweep are the models themselves
        found[name], found["base"] = parts[0.0], parts[1.0]
    return {"stable": _sweep("stable_or_base", ["stable", "base"], (0.0, 1.0), "heldout")[0.0], **found}


def dpo() -> Result:
    """The planted habit is unlearned, and with chosen and rejected swapped it is not."""
    stratum("train", "-cn", "tiny_align_dpo")
    broken("wrong_sign", "-cn", "tiny_align_dpo", "run.name=dpo_broken")
    tasks = _tasks("plain", "habit", "sums")
    return {name: evaluate(name, *tasks) for name in ("sft", "dpo", "dpo_broken")}


def grpo() -> Result:
    """The sums that SFT left uncertain, and the same with advantages of zero."""
    stratum("train", "-cn", "tiny_align_grpo")
    steps = f"run.steps={BROKEN_GRPO_STEPS}"
    broken("zero_advantages", "-cn", "tiny_align_grpo", "run.name=grpo_broken", steps)
    found: Result = {"sft": evaluate("sft", *_tasks("small_sums"))}
    return found | {name: rewards(name) | evaluate(name, *_tasks("small_sums")) for name in ("grpo", "grpo_broken")}


def rlhf() -> Result:
    """A reward model of preferences, and GRPO with it."""
    stratum("train", "-cn", "tiny_align_reward")
    stratum("train", "-cn", "tiny_align_rlhf")
    tasks = _tasks("plain", "habit")
    found = rewards("rlhf")
    return {
        "sft": evaluate("sft", *tasks),
        "rlhf": found | evaluate("rlhf", *tasks),
        "bounded": found["kl_largest"] <= KL_BOUND,
    }


def gamed() -> Result:
    """GRPO with a reward model that prefers large numbers to right sums, with and without the KL term."""
    stratum("train", "-cn", *GAMED_REWARD)
    found: Result = {"sft": evaluate("sft", *_tasks("small_sums"))}
    for name, weight in GAMED_KL.items():
        words = [f"objective.grpo.reward_model={FOLDER}/gamed_reward", f"objective.grpo.kl_weight={weight}"]
        stratum("train", "-cn", "tiny_align_grpo", f"run.name={name}", f"run.steps={GAMED_STEPS}", *words)
        found[name] = rewards(name) | evaluate(name, *_tasks("small_sums"))
    return found


STAGES: dict[str, Callable[[], Result]] = {
    "data": data,
    "pretrain": pretrain,
    "sft": sft,
    "broken_sft": broken_sft,
    "skills": skills,
    "merge": merge,
    "windows": windows,
    "dpo": dpo,
    "grpo": grpo,
    "rlhf": rlhf,
    "gamed": gamed,
}
"""In order."""


def main() -> int:
    """Run the stages that have no result yet, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw-only", action="store_true", help="table and picture of the results so far; run nothing")
    parser.add_argument("--only", help="run one stage, even if it has a result")
    parser.add_argument("--to", type=Path, default=ROOT / "docs/pictures/align_road.png")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    for name, stage in STAGES.items():
        path = RESULTS / f"{name}.json"
        if arguments.draw_only or (name != arguments.only and (path.exists() or arguments.only)):
            continue
        print(f"--- {name}", flush=True)
        started = time.perf_counter()
        result = stage()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds": time.perf_counter() - started, **result}, indent=1) + "\n")
    results = {
        name: json.loads((RESULTS / f"{name}.json").read_text())
        for name in STAGES
        if (RESULTS / f"{name}.json").exists()
    }
    show(results, Console(highlight=False, width=120))
    if arguments.draw_only or results.keys() == STAGES.keys():
        draw(results, arguments.to)
    return 0


def evaluate(run: str, *tasks: Path) -> dict[str, float]:
    """Score of each task file by its name."""
    stratum("evaluate", str(FOLDER / run), "--tasks", ",".join(map(str, tasks)), "--out", str(SCORES / run), "--resume")
    found = json.loads((SCORES / run / "results.json").read_text())["tasks"]
    return {task.stem: found[task.stem]["metrics"]["score"]["value"] for task in tasks}


def rewards(name: str) -> Result:
    """First and last rewards of a run of GRPO (means of ENDS batches): learned from, and true, by the verifier. Its KL."""
    curve = rollouts(name)
    found: Result = {}
    for key in ("reward", "true"):
        values = [batch[key] for batch in curve]
        found[f"{key}_first"], found[f"{key}_last"] = statistics.fmean(values[:ENDS]), statistics.fmean(values[-ENDS:])
    kl = [line["loss_parts"]["kl"] for line in _recorded(name, "step")]
    gap = max(line["log_prob_gap"]["max"] for line in _recorded(name, "rollouts"))
    return found | {"kl_largest": max(kl), "kl_last": kl[-1], "largest_gap": gap}


def rollouts(name: str) -> list[dict[str, float]]:
    """The rewards of each batch of a run: learned from, and true."""
    return [
        {"reward": event["reward_mean"], "true": event["verifiers"]["exact"]["reward_mean"]}
        for event in _recorded(name, "rollouts")
    ]


def _recorded(name: str, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (FOLDER / name / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def stratum(*words: str) -> None:
    """Run a command of ours; its output goes to FOLDER/log.txt. SystemExit with the end of it if the command fails."""
    run([sys.executable, "-m", "train.stratum", *words])


def broken(fault: str, *words: str) -> None:
    """`stratum train WORDS` with a planted fault."""
    run([sys.executable, "-m", "tests.bench.broken_alignment", fault, *words])


def run(words: Sequence[str]) -> None:
    """Run a program as `stratum` does."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "log.txt"
    with log.open("a") as stream:
        stream.write(f"$ {' '.join(words[1:])}\n")
        stream.flush()
        status = subprocess.run(words, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, check=False).returncode
    if status:
        end = "\n".join(log.read_text().splitlines()[-20:])
        raise SystemExit(f"status {status}; the end of {log}:\n{end}")


def _tasks(*names: str) -> list[Path]:
    return [DATA / f"{name}.yaml" for name in names]


def _pretraining(name: str) -> list[str]:
    return [
        "-cn", "tiny_teacher", "model=tiny_student", f"run.folder={FOLDER}", f"run.name={name}", f"run.steps={BASE_STEPS}",
        f"schedule.decay={BASE_STEPS - STABLE_STEPS}", "schedule.warmup=40", "evaluate.every_steps=0",
    ]  # fmt: skip


def _chats(data_name: str, file: Path) -> list[str]:
    return ["-cn", "tiny_sft", f"data.folder={FOLDER}/prepared/{data_name}", f"data.sources.chats.path={file}"]


def _fine_tuning(name: str, data_name: str, *, start: str, steps: int, rate: float) -> list[str]:
    file = DATA / "chats.jsonl" if data_name == "sft" else DATA / data_name / "chats.jsonl"
    return [
        *_chats(data_name, file), "model=tiny_student", f"run.folder={FOLDER}", f"run.name={name}", f"run.steps={steps}",
        f"run.start_from={FOLDER}/{start}", f"optim.lr={rate}", "schedule.warmup=20", "evaluate.every_steps=0",
    ]  # fmt: skip


def _sweep(out: str, models: Sequence[str], alphas: Sequence[float], scored_by: str) -> dict[float, dict[str, float]]:
    """`stratum merge` of two runs with several alphas. -> the parts of each alpha's score."""
    if not (FOLDER / out).exists():
        words = ["--alpha", ",".join(map(str, alphas)), "--evaluate", scored_by, "--out", str(FOLDER / out)]
        stratum("merge", *(str(FOLDER / model) for model in models), *words)
    found = json.loads((FOLDER / out / "merge.json").read_text())
    return {one["alpha"]: one["parts"] for one in found["candidates"]}


def show(results: dict[str, Result], console: Console) -> None:
    """The table of docs/align.md."""
    table = Table("stage", "seconds", "result")
    for name, result in results.items():
        table.add_row(name, f"{result['seconds']:.0f}", _lines(result))
    console.print(table)
    console.print(f"together {sum(result['seconds'] for result in results.values()) / 60:.1f} minutes")


def _lines(result: Result) -> str:
    return "\n".join(f"{key}: {_text(value)}" for key, value in result.items() if key != "seconds")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(results: dict[str, Result], path: Path) -> None:
    """A picture of all stages that have a result."""
    panels = [panel for stages, panel in PANELS.items() if set(stages) <= results.keys()]
    rows = -(-len(panels) // COLUMNS)
    with canvas(path, size=(13, 4 * rows)) as figure:
        for number, panel in enumerate(panels):
            panel(figure.add_subplot(rows, COLUMNS, number + 1), results)


def _draw_sft(axes: Any, results: dict[str, Result]) -> None:
    bars = {"before": results["pretrain"]["taught"], "SFT": results["sft"]["taught"]}
    names = {"whole_chat": "whole chat\nlearned", "prompt_only": "prompt only\nlearned"}
    failed = results.get("broken_sft", {})
    bars |= {label: failed[fault] for fault, label in names.items() if fault in failed}
    axes.bar(list(bars), list(bars.values()), color=[MUTED, SERIES[1], SERIES[3], SERIES[3]][: len(bars)])
    axes.axhline(0.9, color=MUTED, linestyle=":", linewidth=1)
    axes.set(title="SFT: instructions never trained on", ylabel="exact answers, share", ylim=(0, 1.02))


def _draw_merge(axes: Any, results: dict[str, Result]) -> None:
    """The two skills by alpha."""
    sums = {float(alpha): parts for alpha, parts in results["merge"]["sums"].items()}
    for skill, color in zip(SKILLS, SERIES, strict=False):
        axes.plot(list(sums), [parts[skill] for parts in sums.values()], marker=".", color=color, label=skill)
    axes.plot(list(sums), [sum(parts.values()) for parts in sums.values()], marker=".", color=SERIES[3], label="sum")
    first, second = SKILLS
    title = f"Merged: (1 - alpha) {first} + alpha {second}"
    axes.set(title=title, xlabel="alpha", ylabel="exact answers, share", ylim=(0, None))
    axes.legend()


def _draw_windows(axes: Any, results: dict[str, Result]) -> None:
    losses = {name: statistics.fmean(parts.values()) for name, parts in results["windows"].items() if name != "seconds"}
    names = [name.replace("window_", "average,\n").replace("base", "decayed") for name in losses]
    axes.plot(names, list(losses.values()), "o", color=SERIES[0])
    axes.set(title="Decay emulated by averaging", ylabel="held-out bits per byte")
    axes.margins(x=0.2)
    axes.grid(visible=True, axis="y")


def _draw_dpo(axes: Any, results: dict[str, Result]) -> None:
    bars = {"SFT": "sft", "DPO": "dpo", "chosen and\nrejected swapped": "dpo_broken"}
    shares = [results["dpo"][name]["habit"] for name in bars.values()]
    axes.bar(list(bars), shares, color=[MUTED, SERIES[1], SERIES[3]])
    axes.set(title="DPO: a planted habit", ylabel="answers with it, share", ylim=(0, 1.02))


def _draw_grpo(axes: Any, results: dict[str, Result]) -> None:
    """The true reward of each batch."""
    for name, label in (("grpo", "GRPO"), ("grpo_broken", "advantages of 0")):
        axes.plot([batch["true"] for batch in rollouts(name)], label=label)
    axes.legend()
    axes.set(title="GRPO: sums", xlabel="batch", ylabel="right answers, share", ylim=(0, 1.02))


def _draw_rlhf(axes: Any, results: dict[str, Result]) -> None:
    for name, label in (("rlhf", "RLHF"), ("gamed_free", "gamed, no KL"), ("gamed_kl", "gamed, KL")):
        axes.plot([batch["true"] for batch in rollouts(name)], label=label)
    axes.legend()
    axes.set(title="Learning from a reward model", xlabel="batch", ylabel="true reward", ylim=(0, 1.02))


PANELS: dict[tuple[str, ...], Callable[[Any, dict[str, Result]], None]] = {
    ("pretrain", "sft"): _draw_sft,
    ("merge",): _draw_merge,
    ("windows",): _draw_windows,
    ("dpo",): _draw_dpo,
    ("grpo",): _draw_grpo,
    ("rlhf", "gamed"): _draw_rlhf,
}
"""Parts of the picture, and the stages that each needs."""
COLUMNS = 3


if __name__ == "__main__":
    sys.exit(main())

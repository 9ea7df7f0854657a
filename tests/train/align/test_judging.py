"""The rewards of a run's answers: which code may run, and what the journal keeps."""

import re
from pathlib import Path
from typing import Any

import pytest
from policy_runs import policy_recipe

from data.chat.prompts import Prompt
from recipes.schema.align import GrpoConfig
from recipes.schema.errors import CheckpointError, DataError, RecipeError
from recipes.schema.manifest import Manifest
from recipes.schema.rules import resume_problems
from train.align.frozen_models import REFERENCE, FrozenModels, check_frozen_models
from train.align.judging import Case, Judges, check_prompts

RANDOM = {"kind": "function", "name": "tests.reward_functions:random_reward"}
CONFIG = GrpoConfig(allowed_functions=("tests.reward_functions:random_reward",))


def prompt(verifier: dict[str, Any] | None, **facts: Any) -> Prompt:
    return Prompt([{"role": "user", "content": "Say 7."}], None, verifier, facts, "p.jsonl line 3")


@pytest.mark.parametrize(
    ("verifier", "error", "text"),
    [
        ({"kind": "numbr"}, DataError, "p.jsonl line 3: kind='numbr' is not a verifier. Did you mean number"),
        (None, DataError, "p.jsonl line 3: the prompt has no verifier"),
        ({"kind": "exact"}, DataError, "p.jsonl line 3: the record's 'target' is NoneType, not str"),
        ({"kind": "number"}, DataError, "p.jsonl line 3: the record's 'target' is NoneType"),
        ({"kind": "math"}, DataError, "p.jsonl line 3: the record's 'target' is NoneType"),
        ({"kind": "reasoning", "generator": "basic_arithmetic"}, DataError, "line 3: the record's 'entry' is NoneType"),
        ({"kind": "constraints"}, DataError, "p.jsonl line 3: the record's 'constraints' is NoneType"),
        ({"kind": "tags", "names": ["a b"]}, DataError, "p.jsonl line 3: names=['a b'] is not a list of tag names"),
        ({"kind": "function", "name": "os:system"}, RecipeError, "os:system is code that would run with your rights"),
    ],
)
def test_a_verifier_that_may_not_run_is_named(verifier: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        check_prompts([prompt({"kind": "exact"}, target="7"), prompt(verifier)], CONFIG)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"target": "seven"}, "the target 'seven' has no number"),
        ({"constraints": []}, "the record has no constraints"),
        ({"constraints": [{"kind": "no_commas"}, {"kind": "wrods", "least": 1}]}, "there is no constraint 'wrods'"),
        ({"constraints": [{"kind": "words"}]}, "constraint words needs least, most or both"),
        ({"constraints": [{"kind": "no_commas"}], "all": "yes"}, "the record's 'all' is str, not bool"),
    ],
)
def test_facts_of_every_prompt_are_checked_before_the_first_step(facts: dict[str, Any], text: str) -> None:
    """Also those of prompts whose verifier is that of an earlier prompt."""
    kind, right = (
        ("number", {"target": 7}) if "target" in facts else ("constraints", {"constraints": [{"kind": "ascii"}]})
    )
    with pytest.raises(DataError, match=re.escape(f"p.jsonl line 3: {text}")):
        check_prompts([prompt({"kind": kind}, **right), prompt({"kind": kind}, **facts)], CONFIG)


def test_a_verifier_that_does_not_start_again_costs_rewards_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise DataError("it ended. It may need more memory.")

    cases = [Case(0, number, prompt(RANDOM), "a") for number in range(2)]
    with Judges(tmp_path, CONFIG, rank=0) as judges:
        with monkeypatch.context() as patched:
            patched.setattr("train.align.judging.Judge", refuse)
            rewards = judges.rewards(cases, step=1)
        assert [(reward.value, reward.what) for reward in rewards] == [(None, "did not start")] * 2
        assert "it ended" in rewards[0].failure
        again = [Case(1, number, prompt(RANDOM), "a") for number in range(2)]
        assert judges.rewards(again, step=1)[0].value is not None
        (judge,) = judges._judges.values()
        judge.close()  # as after a time-out
        monkeypatch.setattr(judge, "_start", refuse)
        (reward,) = judges.rewards([Case(2, 0, prompt(RANDOM), "a")], step=1)
        assert reward.what == "did not start" and judge.failures["did not start"] == 1


def test_verifiers_that_hang_use_up_one_limit_of_the_batch(tmp_path: Path) -> None:
    """Those that hang are not started again; one that runs still judges."""
    names = [f"tests.reward_functions:{name}" for name in ("fails", "digit_share", "random_reward")]
    kinds = [{"kind": "function", "name": name} for name in names]
    config = GrpoConfig(allowed_functions=tuple(names), verifier_seconds=1.0, verifier_lost_seconds=0.5)
    cases = [Case(0, n, prompt(kinds[0], how="hang"), "7") for n in range(3)]
    cases += [Case(n, 0, prompt(kinds[n]), "7") for n in (1, 2)]
    with Judges(tmp_path, config, rank=0) as judges:
        judges.try_all(kinds[:2])
        found = judges.rewards(cases, step=1)
        assert [one.what for one in found] == ["timed out", "not judged", "not judged", "", "not judged"]
        assert judges.rewards(cases, step=1) == found, "the journal has them all"
        assert [one.what for one in judges.rewards([Case(9, 0, prompt(kind), "7") for kind in kinds], step=2)] == [
            ""
        ] * 3


def test_a_reward_model_needs_no_verifiers() -> None:
    assert check_prompts([prompt(None)], GrpoConfig(reward_model="runs/reward")) == []
    assert check_prompts([prompt(RANDOM), prompt(RANDOM), prompt({"kind": "exact"}, target="7")], CONFIG) == [
        RANDOM,
        {"kind": "exact"},
    ]


def test_damaged_lines_of_the_journal_are_judged_again(tmp_path: Path) -> None:
    folder, case = tmp_path / "rewards", Case(0, 0, prompt(RANDOM), "a")
    folder.mkdir()
    entry = f'{{"key": "{case.key}", "failure": "", "what": "", "value": '
    lines = [b"\xff\xfe", *(f"{entry}{value}}}".encode() for value in ("NaN", '"x"', "null", "[1]")), b"[]", b"null"]
    (folder / "step_00000001.00000.jsonl").write_bytes(b"\n".join(lines))
    (folder / "step_mine.jsonl").mkdir()
    with Judges(folder, CONFIG, rank=0) as judges:
        judges.forget_before(1)
        (reward,) = judges.rewards([case], step=1)
    assert reward.value is not None and 0 <= reward.value < 1


def test_the_journal_gives_rewards_again_for_the_same_answers_only(tmp_path: Path) -> None:
    folder, ours = tmp_path / "rewards", prompt(RANDOM)
    cases = [Case(0, number, ours, text) for number, text in enumerate(["a", "a", "b"])]
    with Judges(folder, CONFIG, rank=0) as judges:
        first = judges.rewards(cases, step=4)
    assert len({reward.value for reward in first}) == 3, "equal texts are judged each by itself"
    (path,) = folder.iterdir()
    path.write_text(path.read_text() + '{"key": "cut')  # a kill cut the last line
    others = [Case(0, 0, ours, "c"), Case(1, 0, ours, "a"), Case(0, 0, prompt(RANDOM, more=1), "a")]
    with Judges(folder, CONFIG, rank=0) as judges:
        assert judges.rewards(cases, step=4) == first
        again = judges.rewards([*others, cases[2]], step=4)
    assert again[3] == first[2] and not {one.value for one in again[:3]} & {one.value for one in first}
    with Judges(folder, CONFIG, rank=0) as judges:
        assert judges.rewards([*cases, *others], step=5) == [*first, *again[:3]]
        judges.forget_before(4)
        assert list(folder.iterdir())
        judges.forget_before(5)
        assert not list(folder.iterdir())


def test_another_reference_than_at_the_start_is_refused(tmp_path: Path) -> None:
    then, now = ({"checkpoint": f"runs/{name}", "fingerprint": name * 8} for name in "ab")
    frozen = FrozenModels(lineage={REFERENCE: now})
    check_frozen_models(frozen, policy_recipe(tmp_path), before={REFERENCE: now})
    with pytest.raises(CheckpointError, match=r"the reference of this run was runs/a .*objective.grpo.reference"):
        check_frozen_models(frozen, policy_recipe(tmp_path), before={REFERENCE: then})
    check_frozen_models(
        frozen, policy_recipe(tmp_path, **{"checkpoint.allow": ("arithmetic",)}), before={REFERENCE: then}
    )


def test_changed_prompts_are_refused_like_changed_data(tmp_path: Path) -> None:
    manifest = Manifest(data_hash="a" * 64)
    (problem,) = resume_problems(policy_recipe(tmp_path), manifest, place="step_1", data_hash="b" * 64)
    assert problem.key == "objective.grpo.prompts" and "Restore the old prompts" in problem.remedy

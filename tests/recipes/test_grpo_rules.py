"""Rules of GRPO: each mistake is named with its field and a remedy, before a process starts."""

from pathlib import Path
from typing import Any

import pytest
from policy_runs import policy_recipe

from recipes.schema.changes import differences, refused
from recipes.schema.grpo_rules import grpo_notes, grpo_problems
from recipes.schema.read import recipe_mapping
from recipes.schema.rules import notes, problems, reading_problems


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"objective.grpo.prompts": ()}, "objective.grpo.prompts"),
        ({"run.start_from": None}, "run.start_from"),
        ({"parallel.pipeline": 2}, "objective.kind"),
        ({"parallel.context": 2}, "objective.kind"),
        ({"parallel.tensor": 2, "parallel.sequence": True}, "objective.kind"),
        ({"data.reset_at_documents": False}, "data.reset_at_documents"),
        ({"objective.grpo.max_answer_tokens": 64}, "objective.grpo.max_answer_tokens"),
        ({"objective.grpo.updates_per_batch": 3, "objective.grpo.passes_per_batch": 2}, "objective.grpo.passes_per_batch"),
        ({"objective.grpo.generations_per_prompt": 10**9}, "objective.grpo.generations_per_prompt"),
        ({"objective.grpo.off_policy_steps": 1}, "objective.grpo.importance_cap"),
        ({"schedule.unit": "tokens"}, "schedule.unit"),
        ({"precision.switch_at_tokens": 100}, "precision.switch_at_tokens"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_a_remedy(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    (problem,) = grpo_problems(policy_recipe(tmp_path, **changes), backend="reference")
    assert problem.key == key and problem.remedy
    assert str(problem) in map(str, problems(policy_recipe(tmp_path, **changes)))


def test_the_te_backend_is_refused_and_other_objectives_are_not_judged(tmp_path: Path) -> None:
    recipe = policy_recipe(tmp_path)
    assert not problems(recipe) and not reading_problems(recipe)
    (problem,) = grpo_problems(recipe, backend="te")
    assert "the te backend" in problem.text
    assert not grpo_problems(
        policy_recipe(tmp_path, **{"objective.kind": "next_token", "run.start_from": None}), backend="te"
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"objective.grpo.kl_estimator": "k1"}, "gradient of 0"),
        ({"objective.grpo.kl_weight": 0.0, "objective.grpo.reference": "runs/x"}, "is not read"),
        ({"objective.grpo.top_p": 0.9}, "another distribution"),
        ({"objective.grpo.verifier_seconds": 100.0}, "launch.timeout_s=600"),
    ],
)
def test_a_likely_mistake_is_noted(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    (note,) = grpo_notes(policy_recipe(tmp_path, **changes))
    assert text in note.text


def test_fields_of_another_kind_are_named(tmp_path: Path) -> None:
    recipe = policy_recipe(tmp_path, **{"objective.temperature": 2.0})
    assert any("does not use objective.temperature=2.0" in str(note) for note in notes(recipe))


def test_what_a_resume_may_change(tmp_path: Path) -> None:
    before = recipe_mapping(policy_recipe(tmp_path))

    def why(**changes: Any) -> str | None:
        return refused(differences(before, recipe_mapping(policy_recipe(tmp_path, **changes))), ())

    assert why(**{"objective.grpo.generation_rows": 8, "objective.grpo.log_prob_gap": 1e-4}) is None
    assert "arithmetic" in str(why(**{"objective.grpo.clip_high": 0.3}))
    assert "data order" in str(why(**{"objective.grpo.prompts": ("other.jsonl",)}))
    assert "a fixed property of a run" in str(why(**{"objective.grpo.generations_per_prompt": 8}))

"""Rules of `objective.kind: grpo`: problems that the recipe alone shows. `recipes.schema.rules.problems` calls them."""

from recipes.schema.align import GrpoConfig
from recipes.schema.errors import Problem
from recipes.schema.layout import reads_whole_rows_only
from recipes.schema.recipe import Recipe

_MOST_ANSWERS = 1 << 20
"""Answers of a batch. Every rank holds all of them with their numbers."""


def grpo_problems(recipe: Recipe, *, backend: str) -> list[Problem]:
    """Problems of a recipe that draws answers from the model that it trains; [] for other objectives.

    backend: `rules.backend_name`, or the recipe's where the machine is not known.
    """
    if recipe.objective.kind != "grpo":
        return []
    config, found = recipe.objective.grpo, []
    if not config.prompts:
        text = "objective.kind=grpo learns from answers to prompts, and objective.grpo.prompts is empty."
        remedy = "Name files of prompts with verifiers, such as [prompts/*.jsonl], or use objective.kind=next_token."
        found.append(Problem("objective.grpo.prompts", text, remedy))
    if recipe.run.start_from is None:
        text = "run.start_from=null: a model of random weights earns no rewards to learn from."
        found.append(Problem("run.start_from", text, "Name the run or checkpoint to start from."))
    if whole := reads_whole_rows_only(recipe.parallel, backend):
        text = f"objective.kind=grpo draws answers from the model that trains; {', '.join(whole)} cannot generate text."
        plain = {"parallel.pipeline": 1, "parallel.context": 1, "parallel.sequence": "false"}
        plain |= {"parallel.expert": 1, "parallel.expert_tensor": 1}
        remedies = [f"{key}={plain[key]}" for key in (name.partition("=")[0] for name in whole) if key in plain]
        remedies += ["precision.backend=reference"] if backend == "te" else []
        remedy = f"Use {', '.join(remedies)}. Tensor and data ranks may stay."
        found.append(Problem("objective.kind", text, remedy))
    if not recipe.data.reset_at_documents:
        text = "data.reset_at_documents=false, but a row holds several answers, which must not see each other."
        found.append(Problem("data.reset_at_documents", text, "Set data.reset_at_documents=true."))
    if config.max_answer_tokens >= recipe.data.row_tokens:
        text = (
            f"objective.grpo.max_answer_tokens={config.max_answer_tokens:,} leaves no room for a prompt in a row of "
            f"data.row_tokens={recipe.data.row_tokens:,}."
        )
        remedy = f"Use objective.grpo.max_answer_tokens={max(1, recipe.data.row_tokens // 2)}, or longer rows."
        found.append(Problem("objective.grpo.max_answer_tokens", text, remedy))
    if config.updates_per_batch % config.passes_per_batch:
        text = (
            f"objective.grpo.passes_per_batch={config.passes_per_batch} does not divide "
            f"updates_per_batch={config.updates_per_batch}."
        )
        found.append(Problem("objective.grpo.passes_per_batch", text, "Each pass is a whole number of updates."))
    if (answers := _prompts_of_batch(config) * config.generations_per_prompt) > _MOST_ANSWERS:
        text = (
            f"objective.grpo: a batch has {answers:,} answers (prompts_per_step={config.prompts_per_step:,}, "
            f"generations_per_prompt={config.generations_per_prompt:,}, updates_per_batch={config.updates_per_batch:,}); "
            f"every rank keeps them in memory, at most {_MOST_ANSWERS:,}."
        )
        found.append(Problem("objective.grpo.generations_per_prompt", text, "Lower them."))
    if config.off_policy_steps and config.importance_cap is None:
        text = "objective.grpo.off_policy_steps=1 learns from answers of older weights, and importance_cap=null ignores that."
        found.append(
            Problem("objective.grpo.importance_cap", text, "Set objective.grpo.importance_cap=2, for example.")
        )
    if recipe.schedule.unit == "tokens":
        text = "schedule.unit=tokens: the tokens of a step depend on the lengths of answers."
        found.append(Problem("schedule.unit", text, "Use schedule.unit=steps."))
    if recipe.precision.switch_at_tokens is not None:
        text = "precision.switch_at_tokens: the tokens of a step depend on the lengths of answers."
        found.append(Problem("precision.switch_at_tokens", text, "Set precision.switch_at_tokens=null."))
    return found


def grpo_notes(recipe: Recipe) -> list[Problem]:
    """What is allowed but probably a mistake; [] for other objectives."""
    if recipe.objective.kind != "grpo":
        return []
    config, found = recipe.objective.grpo, []
    if config.kl_weight and config.kl_estimator == "k1":
        text = "objective.grpo.kl_estimator=k1 has a gradient of 0 in expectation, so kl_weight holds nothing back."
        found.append(Problem("objective.grpo.kl_estimator", text, "Use k2 or k3."))
    if not config.kl_weight and config.reference is not None:
        text = f"objective.grpo.reference={config.reference} is not read, because kl_weight=0."
        found.append(Problem("objective.grpo.reference", text))
    if config.top_p < 1:
        text = f"objective.grpo.top_p={config.top_p:g}: answers are drawn from another distribution than the loss is about."
        found.append(Problem("objective.grpo.top_p", text, "Use 1."))
    if recipe.data.sources:
        text = f"objective.kind=grpo does not read data.sources.{next(iter(recipe.data.sources))}."
        found.append(Problem("data.sources", text))
    slow_s = verifier_limit_s(config, data_ranks=1)
    if slow_s > recipe.launch.timeout_s:
        text = (
            f"judging a batch may take {slow_s:,.0f} s on one data rank, if every answer takes "
            f"objective.grpo.verifier_seconds={config.verifier_seconds:g}. Ranks that wait give up after "
            f"launch.timeout_s={recipe.launch.timeout_s:g}."
        )
        found.append(Problem("launch.timeout_s", text, "Raise it, or lower verifier_seconds."))
    return found


def verifier_limit_s(config: GrpoConfig, *, data_ranks: int) -> float:
    """Seconds that the judging of a batch takes at most on each of `data_ranks` ranks."""
    return _prompts_of_batch(config) / data_ranks * config.generations_per_prompt * config.verifier_seconds


def _prompts_of_batch(config: GrpoConfig) -> int:
    return config.prompts_per_step * config.updates_per_batch // config.passes_per_batch

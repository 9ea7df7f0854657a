"""Fields of the `evaluate` group: held-out evaluation and tasks during training.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass

from recipes.schema.fields import Count, PositiveInt


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation and tasks during training."""

    every_steps: Count = 100
    """Evaluate at every multiple of this step, and at the start and end; 0: at the start and end only."""
    rows_per_source: PositiveInt = 32
    """Number of held-out rows of each source to score; all of them if there are fewer."""
    tasks: tuple[str, ...] = ()
    """Tasks to score during training: names such as needle-1k, or task files (docs/evaluate.md). Tasks that need generated text
    work without pipeline, context, expert and sequence parallelism."""
    tasks_every_steps: Count = 1000
    """Score tasks at every multiple of this step, and at the start and end; 0: at the start and end only."""
    task_items: PositiveInt = 256
    """Number of items of each task to score; all of them if there are fewer."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model continues at each held-out evaluation (`every_steps`), to be read in the report. They need what tasks
    with generated text need. All ranks wait for them: sample_tokens forward passes of one token for each 16 prompts of a rank."""
    sample_tokens: PositiveInt = 64
    """Largest number of tokens to write after each of sample_prompts."""


def heldout_is_due(config: EvaluateConfig, step: int, *, steps: int) -> bool:
    """Whether held-out rows are scored after `step` of `steps` steps."""
    return _is_due(config.every_steps, step, steps)


def samples_are_due(config: EvaluateConfig, step: int, *, steps: int) -> bool:
    """Whether sample_prompts are continued after `step` of `steps` steps."""
    return bool(config.sample_prompts) and heldout_is_due(config, step, steps=steps)


def tasks_are_due(config: EvaluateConfig, step: int, *, steps: int) -> bool:
    """Whether tasks are scored after `step` of `steps` steps."""
    return bool(config.tasks) and _is_due(config.tasks_every_steps, step, steps)


def _is_due(every_steps: int, step: int, steps: int) -> bool:
    return step in (0, steps) or (every_steps > 0 and step % every_steps == 0)

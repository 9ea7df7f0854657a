"""Fields of objectives that align a model: nested groups of `objective`.

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.fields import (
    Count,
    GroupSize,
    HalfFraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    ProcessGib,
    ShortTime,
    Temperature,
    ZeroOrOne,
)


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation (arXiv 2305.18290; docs/align.md)."""

    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference. 0.1 is the paper's usual value."""
    label_smoothing: HalfFraction = 0.0
    """Assumed probability that chosen and rejected are swapped (conservative DPO)."""
    length_normalized: bool = False
    """Divide an answer's log-ratio to the reference by its number of tokens, so that long answers do not count more."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the cross-entropy of the chosen answers, in nats per token, which keeps them likely."""
    reference: str | None = None
    """Reference model: a checkpoint folder, or a run folder (its newest checkpoint). null: the weights of `run.start_from`."""
    reference_log_probs: Literal["cached", "online"] = "cached"
    """`cached`: compute the reference's log-probabilities of all rows before step 1 and store them in the run's folder.
    `online`: keep the reference in memory and compute them at every step."""


@dataclass(frozen=True)
class GrpoConfig:
    """GRPO (arXiv 2402.03300) and its variants, for `objective.kind: grpo` (docs/align.md)."""

    prompts: tuple[str, ...] = ()
    """Files of prompts, at least one: jsonl, local paths or URLs, compressed or not, globs. A record has `messages` (or the text
    `prompt`, which becomes a user message), a mapping `verifier`, and in its other fields the facts that the verifier needs."""
    prompts_per_step: PositiveInt = 32
    """Prompts whose answers one step (one update of the weights) learns from."""
    generations_per_prompt: GroupSize = 16
    """Answers to each prompt. They form a group, and their rewards are compared with each other."""
    max_answer_tokens: PositiveInt = 512
    """Answers are cut off after this many tokens. Prompt and answer must fit into `data.row_tokens`."""
    temperature: Temperature = 1.0
    """Divides the logits when answers are drawn. The loss is that of the same distribution."""
    top_p: PositiveFraction = 1.0
    """Draw only from the most likely tokens that together have this probability. The loss always uses the whole distribution, so
    it is biased below 1."""
    clip_low: PositiveFraction = 0.2
    """Lower clip of the ratio of new to old probability: 1 - `clip_low`."""
    clip_high: PositiveFloat = 0.2
    """Upper clip of that ratio: 1 + `clip_high` (DAPO, arXiv 2503.14476, and Nemotron 3 Nano: 0.28)."""
    kl_weight: NonNegativeFloat = 0.01
    """Weight of the divergence from the reference; 0: no reference is loaded. 0.01 is NeMo-RL's value for Nemotron Nano 2."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the divergence on sampled tokens. With d = log p - log p reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 +
    d. The gradient of k1 is 0 in expectation."""
    reference: str | None = None
    """Checkpoint or run folder of the reference; null: `run.start_from`."""
    reward_model: str | None = None
    """Run or checkpoint of a reward model (`objective.kind: reward`) that gives the rewards (RLHF). Verifiers are then optional,
    and their rewards are only recorded. null: learn from the verifiers' rewards."""
    advantage: Literal["group_mean", "leave_one_out"] = "group_mean"
    """Baseline of a reward: the mean of its group, or of the other answers in its group (arXiv 2402.14740)."""
    normalize: bool = True
    """Divide advantages by the standard deviation of their group."""
    ratio: Literal["token", "sequence"] = "token"
    """`token`: one ratio per token. `sequence`: one per answer, the geometric mean over its tokens (GSPO, arXiv 2507.18071)."""
    mean_over: Literal["tokens", "answers"] = "tokens"
    """Mean of the loss: over all tokens of a step, or over all answers (each the mean over its tokens)."""
    mask_overlong: bool = False
    """Do not learn from answers that were cut off (DAPO's overlong filtering). Their rewards still count in their group."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by groups of the next prompts (DAPO)."""
    most_prompts: PositiveInt = 4
    """With `dynamic_sampling`: maximum prompts drawn for a batch, as a multiple of its prompts. After that, groups without a
    gradient fill the batch."""
    updates_per_batch: PositiveInt = 1
    """Steps whose answers are drawn at once, with the weights before the first of these steps. 1: always the newest weights."""
    passes_per_batch: PositiveInt = 1
    """How often each of these answers is learned from; must divide `updates_per_batch`. A batch has `prompts_per_step` x
    `updates_per_batch` / `passes_per_batch` prompts."""
    off_policy_steps: ZeroOrOne = 0
    """1: draw the answers of a batch before the updates of the previous batch, with older weights (needs `importance_cap`)."""
    importance_cap: PositiveFloat | None = None
    """Weight each token by its probability when the batch begins, divided by that when it was drawn, at most this (truncated
    importance weights; NeMo-RL: 2). null: no weights."""
    generation_rows: PositiveInt = 64
    """Answers that a tensor group generates at once. More need more memory for keys and states (shown by `stratum plan`)."""
    log_prob_gap: PositiveFloat | None = None
    """Largest allowed difference of a token's log p between sampler and trainer, recorded for every batch; a larger one stops the
    run. null: 1e-5 in fp32, 1 in bf16 and low precision."""
    mean_log_prob_gap: PositiveFloat | None = None
    """The same for the mean over the tokens of a batch. null: 1e-6 in fp32, 0.05 in bf16 and low precision."""
    verifier_seconds: ShortTime = 5.0
    """Time limit of a verifier per answer, in seconds. After it the answer gets no reward."""
    verifier_lost_seconds: ShortTime = 30.0
    """Seconds that verifiers which hang or end may cost a rank in one batch. After that, a verifier that hangs
    or ends is not started again in this batch, and the rest of its answers get no reward."""
    verifier_gib: ProcessGib = 4.0
    """Memory limit of a verifier's process, in GiB."""
    allowed_functions: tuple[str, ...] = ()
    """Your own reward functions that prompts may name (`module:function`); others are refused. They run with your rights."""
    samples_every_steps: Count = 10
    """Record some answers in metrics.jsonl at every multiple of this step; 0: never."""


@dataclass(frozen=True)
class RewardConfig:
    """Training of a reward model (docs/align.md)."""

    center_weight: NonNegativeFloat = 0.0
    """Weight of (better reward + worse reward)^2 in the loss of a pair, which keeps rewards near 0. With 0 only differences of
    rewards are learned. TRL's documentation recommends 0.01 (arXiv 2312.09244)."""

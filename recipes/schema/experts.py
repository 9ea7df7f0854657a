"""Fields of the `model.experts` group: the mixture of experts of an `E` layer, and the rules between them.

    y(t) = shared(t) + scaling * sum of p_i(t) expert_i(t) over the `top_k` experts chosen for token t

The text under a field is its documentation: meaning, unit, range and reason for the default (source of docs/recipes.md).
"""

from dataclasses import dataclass
from typing import Literal

from recipes.schema.errors import Problem
from recipes.schema.fields import Count, ExpertCount, NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts of each `E` layer: their sizes, router and balancing."""

    count: ExpertCount = 8
    """Routed experts of a layer. Must be divisible by `parallel.expert`."""
    top_k: PositiveInt = 2
    """Experts that process each token."""
    ffn: PositiveInt = 512
    """Inner width of one routed expert (per branch if `model.activation` is gated)."""
    shared_ffn: Count = 0
    """Inner width of the shared expert, which processes every token (Nemotron 3 Nano: 2 x `ffn`); 0: no shared expert."""
    latent: Count = 0
    """Width of the routed experts' inputs and outputs, with one projection before all of them and one after (Nemotron 3 Super:
    1,024); 0: `model.hidden`, without projections."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """Function from router logits to weights, always in fp32. `sigmoid`: of each logit, then divided by the sum over the chosen
    experts. `softmax`: over the chosen experts; with `top_k=1` over all."""
    groups: PositiveInt = 1
    """Groups of experts for group-limited routing (arXiv 2412.19437); must divide `count`. 1: no groups."""
    top_groups: PositiveInt = 1
    """Number of groups that a token's experts come from: those with the largest sum of their best `top_k` / `top_groups`
    scores."""
    scaling: PositiveFloat = 1.0
    """Factor on the weights of the chosen experts (Nemotron 3 Nano: 2.5)."""
    bias_rate: NonNegativeFloat = 1e-3
    """Balancing without a loss (arXiv 2408.15664): after each step, an expert's selection bias rises by this if the expert had
    fewer tokens than the mean, and falls by this if it had more. 0: no bias. Only for `score=sigmoid`."""
    aux_loss: Literal["none", "microbatch", "row"] = "none"
    """Auxiliary balancing loss (arXiv 2101.03961, equation 4), over the tokens of a microbatch or of each row. It adds to the
    gradient, not to the reported loss."""
    aux_coefficient: PositiveFloat = 1e-4
    """Factor of `aux_loss`."""
    capacity: PositiveFloat | None = None
    """Maximum tokens of a microbatch per expert, as a multiple of the mean. In training the tokens with the smallest weights are
    dropped; evaluation and generation drop none. null: no limit."""


def experts_problems(experts: ExpertsConfig) -> list[Problem]:
    """Fields of `model.experts` that exclude each other."""
    found, key = [], "model.experts"
    if experts.top_k > experts.count:
        text = f"{key}.top_k={experts.top_k} is more than {key}.count={experts.count}."
        found.append(Problem(f"{key}.top_k", text, f"Use at most {experts.count}."))
    if experts.bias_rate > 0 and experts.score != "sigmoid":
        text = f"{key}.bias_rate={experts.bias_rate:g} balances sigmoid scores only, but {key}.score={experts.score}."
        found.append(Problem(f"{key}.bias_rate", text, f"Use {key}.bias_rate=0 with an aux_loss, or score=sigmoid."))
    if experts.count % experts.groups:
        text = f"{key}.groups={experts.groups} does not divide {key}.count={experts.count}."
        divisors = [size for size in range(1, experts.count + 1) if experts.count % size == 0]
        found.append(Problem(f"{key}.groups", text, f"Use one of {', '.join(map(str, divisors))}."))
        return found
    if experts.groups == 1 and experts.top_groups == 1:
        return found
    each = experts.count // experts.groups
    if experts.top_groups > experts.groups:
        text = f"{key}.top_groups={experts.top_groups} is more than {key}.groups={experts.groups}."
        found.append(Problem(f"{key}.top_groups", text, f"Use at most {experts.groups}."))
    elif experts.top_k % experts.top_groups or experts.top_k // experts.top_groups > each:
        text = (
            f"{key}.top_k={experts.top_k} from {key}.top_groups={experts.top_groups} groups of {each} experts: a group is scored "
            f"by its best top_k / top_groups experts, which must be a whole number and at most {each}."
        )
        fit = [n for n in range(1, experts.groups + 1) if experts.top_k % n == 0 and experts.top_k // n <= each]
        remedy = f"Use top_groups={' or '.join(map(str, fit))}." if fit else "Use fewer groups or a smaller top_k."
        found.append(Problem(f"{key}.top_groups", text, remedy))
    return found

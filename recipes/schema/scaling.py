"""The low-precision recipes: number formats, blocks and scale rules of the six GEMM operands, and the layers that use them.

One linear layer has three GEMMs and six quantised operands:

    output        = input        x weight          forward
    input grad    = output grad  x weight          data gradient
    weight grad   = output grad' x input           weight gradient (summed over tokens)

A block of one row must extend along the dimension that the GEMM sums over, so that one scale can be taken out of a partial sum.
That dimension is features in the first two GEMMs and tokens in the weight gradient. So recipes with such blocks quantise a
tensor twice, each time from the original.

Both low-precision backends use this table: `emulated` computes the numbers, `te` creates Transformer Engine's recipe object of
the same name. Tables: docs/fp8.md.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from recipes.schema.errors import Problem
from recipes.schema.model import ModelConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.pattern import GATED, layer_kinds
from recipes.schema.precision import LinearRule, PrecisionConfig

HADAMARD = 16
"""Number of values that the Hadamard rotation of NVFP4 mixes (arXiv 2509.25149)."""
Orientation = Literal["rows", "columns"]
"""Direction of one-dimensional blocks. `rows`: along the last dimension (features). `columns`: along the first (tokens)."""


@dataclass(frozen=True)
class Format:
    """A small floating-point format."""

    name: str
    mantissa: int
    """Number of mantissa bits, without the implicit leading one."""
    min_exponent: int
    """Exponent of the smallest normal number. Below it (subnormals), the spacing is constant: 2**(min_exponent - mantissa)."""
    max: float
    """Largest finite number. Larger values saturate to it."""
    snr_floor_db: float
    """Well-scaled values have a higher signal-to-noise ratio than this after quantisation. Less is a sign of a fault
    (docs/fp8.md)."""

    @property
    def overflow(self) -> float:
        """Half a step above the largest number. Values above this are clipped; values between the two round to the largest
        number."""
        return self.max + 2.0 ** (math.frexp(self.max)[1] - 2 - self.mantissa)


E4M3 = Format("e4m3", mantissa=3, min_exponent=-6, max=448.0, snr_floor_db=20.0)
E5M2 = Format("e5m2", mantissa=2, min_exponent=-14, max=57344.0, snr_floor_db=15.0)
E2M1 = Format("e2m1", mantissa=1, min_exponent=0, max=6.0, snr_floor_db=10.0)
"""Formats of the Open Compute Project: OFP8 (E4M3, which has no infinities, and E5M2) and MX (E2M1)."""

Rule = Literal["fp32", "power_of_two", "e8m0", "nvfp4", "history", "unit"]
"""How a block's scale is computed from its largest magnitude (amax):

fp32           format.max / amax, rounded to fp32
power_of_two   as fp32, then rounded down to a power of two. The product with a power of two is exact
e8m0           amax / format.max as a power of two, rounded up (OCP MX scales, as Transformer Engine rounds them)
nvfp4          E4M3 scale per block on top of one fp32 scale per tensor
history        from the amax of earlier steps (delayed scaling)
unit           always 1: shows what happens without scales
"""


@dataclass(frozen=True)
class Operand:
    """How one GEMM operand is quantised."""

    format: Format
    rule: Rule
    block: tuple[int, int] | None = None
    """Extent of a scale's block as (across, along), where `along` is the direction of the sum. None: the whole tensor."""
    hadamard: bool = False
    """First rotate blocks of 16 along the sum by a signed Hadamard matrix. It spreads outliers. Both operands of the GEMM must be
    rotated: then the rotations cancel in the product."""
    stochastic: bool = False
    """Round up or down with a probability given by the distance, instead of to the nearest, so that the error is 0 on average."""

    @property
    def same_both_ways(self) -> bool:
        """Whether both orientations give the same numbers, so that one quantisation can be used in two GEMMs."""
        square = self.block is None or self.block[0] == self.block[1]
        return square and not self.hadamard and not self.stochastic


@dataclass(frozen=True)
class Scaling:
    """The operands of a linear layer's three GEMMs."""

    name: str
    input: Operand
    weight: Operand
    grad: Operand
    """The output gradient in the data-gradient GEMM."""
    input_for_weight_grad: Operand
    grad_for_weight_grad: Operand
    multiple: int
    """On a GPU, both dimensions of the matrices must be multiples of this."""

    @property
    def uses_history(self) -> bool:
        """Whether scales depend on earlier steps, which checkpoints must then store."""
        return self.input.rule == "history"


def scaling_of(precision: PrecisionConfig, name: str | None = None) -> Scaling | None:
    """The scaling that a recipe configures, or the one called `name` with the recipe's options; None for high precision."""

    def uniform(name: str, input: Operand, weight: Operand, grad: Operand, multiple: int = 16) -> Scaling:
        return Scaling(name, input, weight, grad, input, grad, multiple)

    match name or precision.scaling:
        case "none":
            return None
        case "delayed":
            forward, backward = Operand(E4M3, "history"), Operand(E5M2, "history")
            return uniform("delayed", forward, forward, backward)
        case "current":
            forward, backward = Operand(E4M3, "fp32"), Operand(E5M2, "fp32")
            return uniform("current", forward, forward, backward)
        case "blockwise":
            rule: Rule = "power_of_two" if precision.power_of_two_scales else "fp32"
            row = Operand(E4M3, rule, block=(1, 128))
            return uniform("blockwise", row, Operand(E4M3, rule, block=(128, 128)), row)
        case "mxfp8":
            row = Operand(E4M3, "e8m0", block=(1, 32))
            return uniform("mxfp8", row, row, row, multiple=32)
        case "nvfp4":
            row = Operand(E2M1, "nvfp4", block=(1, 16))
            return Scaling(
                "nvfp4",
                input=row,
                weight=Operand(E2M1, "nvfp4", block=(16, 16)),
                grad=Operand(E2M1, "nvfp4", block=(1, 16), stochastic=True),
                input_for_weight_grad=Operand(E2M1, "nvfp4", block=(1, 16), hadamard=True),
                grad_for_weight_grad=Operand(E2M1, "nvfp4", block=(1, 16), hadamard=True, stochastic=True),
                multiple=32,
            )
        case "unscaled":
            forward, backward = Operand(E4M3, "unit"), Operand(E5M2, "unit")
            return uniform("unscaled", forward, forward, backward)
        case other:
            raise ValueError(f"unknown scaling {other!r}")


LINEARS = {
    "M": ("mixer.in_proj", "mixer.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "w": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "-": ("mlp.linear_fc1", "mlp.linear_fc2"),
    "E": ("mlp.experts.linear_fc1", "mlp.experts.linear_fc2"),
}
"""The linear modules of each layer kind, by their name inside the layer. Only these run in low precision, and the two of a
shared expert. The convolution, the scan, softmax, norms, routers, latent projections, embedding and head never do."""
SHARED_LINEARS = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")


def layer_linears(model: ModelConfig, kind: str) -> tuple[str, ...]:
    """The linear modules of a layer kind in this model."""
    return LINEARS[kind] + (SHARED_LINEARS if kind == "E" and model.experts.shared_ffn else ())


def rule_numbers(model: ModelConfig, precision: PrecisionConfig) -> dict[int, dict[str, int]]:
    """{global layer index: {linear: index of the rule of `precision.rules` that decides its scaling}}, between the layers at the
    ends that stay in high precision."""
    found: dict[int, dict[str, int]] = {}
    for index, kind in _between_ends(model, precision):
        for name in layer_linears(model, kind):
            for number, rule in enumerate(precision.rules):
                if _applies(rule, model, index=index, kind=kind, linear=name):
                    found.setdefault(index, {})[name] = number
                    break
    return found


def _between_ends(model: ModelConfig, precision: PrecisionConfig) -> list[tuple[int, str]]:
    """(global index, kind) of the layers that `high_precision_first` and `high_precision_last` leave."""
    kinds = layer_kinds(model.pattern)
    first, last = precision.high_precision_first, len(kinds) - precision.high_precision_last
    return [(index, kind) for index, kind in enumerate(kinds) if first <= index < last]


def _applies(rule: LinearRule, model: ModelConfig, *, index: int, kind: str, linear: str) -> bool:
    layers = len(layer_kinds(model.pattern))
    is_late = index >= layers - round(rule.last_fraction * layers)
    return (not rule.kinds or kind in rule.kinds) and is_late and fnmatchcase(linear, rule.linears)


def linear_scalings(model: ModelConfig, precision: PrecisionConfig, scaling: str) -> dict[int, dict[str, str]]:
    """{global layer index (from 0): {linear: its scaling}} of a step whose scaling is `scaling`; without linears and layers in
    high precision."""
    if scaling == "none":
        return {}
    found: dict[int, dict[str, str]] = {}
    decided = rule_numbers(model, precision)
    for index, kind in _between_ends(model, precision):
        rules = decided.get(index, {})
        names = {
            name: precision.rules[rules[name]].scaling if name in rules else scaling
            for name in layer_linears(model, kind)
        }
        if low := {name: own for name, own in names.items() if own != "none"}:
            found[index] = low
    return found


def low_precision_linears(model: ModelConfig, precision: PrecisionConfig) -> dict[int, tuple[str, ...]]:
    """{global layer index (from 0): names of its low-precision linears}. Layers in high precision are left out.

    The first `high_precision_first` and last `high_precision_last` layers of the pattern stay in high precision, and the linears
    for which a rule says so.
    """
    for scaling in (precision.scaling, precision.scaling_after if precision.switch_at_tokens is not None else "none"):
        if found := linear_scalings(model, precision, scaling):  # which linears are low does not depend on the scaling
            return {index: tuple(names) for index, names in found.items()}
    return {}


def scalings_used(precision: PrecisionConfig) -> list[str]:
    """The low-precision recipes that a run uses, those of rules last; [] if all steps are in high precision."""
    names = [precision.scaling, *([precision.scaling_after] if precision.switch_at_tokens is not None else [])]
    found = [name for name in dict.fromkeys(names) if name != "none"]
    return (
        list(dict.fromkeys([*found, *(rule.scaling for rule in precision.rules if rule.scaling != "none")]))
        if found
        else []
    )


def rule_problems(model: ModelConfig, precision: PrecisionConfig) -> list[Problem]:
    """Rules of `precision.rules` that decide nothing, or that go with no scaling of the run."""
    key, rules, used = "precision.rules", precision.rules, scalings_used(precision)
    if not rules:
        return []
    if not used:
        text = f"{key} has {len(rules)} rules, but precision.scaling=none: all linear layers are in high precision."
        return [
            Problem(key, text, "Set precision.scaling, which is that of the linear layers without a rule, or rules=[].")
        ]
    found = []
    if "delayed" in used:
        text = f"{key} with delayed scaling: Transformer Engine has one autocast for all linear layers then."
        found.append(Problem(key, text, "Use precision.scaling=current, blockwise, mxfp8 or nvfp4."))
    if precision.fp8_weights:
        text = f"{key} with precision.fp8_weights=true: the format of stored weights is one for the whole model."
        found.append(Problem("precision.fp8_weights", text, "Set fp8_weights=false."))
    decided = {number for names in rule_numbers(model, precision).values() for number in names.values()}
    for number, rule in enumerate(rules):
        place = f"{key}[{number}] (kinds={rule.kinds or 'all'}, linears={rule.linears}, last_fraction={rule.last_fraction:g})"
        if strange := "".join(sorted(set(rule.kinds) - set(LINEARS))):
            found.append(
                Problem(key, f"{place}: {strange} is not a kind of layer.", f"Use letters of {''.join(LINEARS)}.")
            )
        elif number not in decided and (not rule.kinds or set(rule.kinds) & set(model.pattern)):
            names = dict.fromkeys(
                name for _, kind in _between_ends(model, precision) for name in layer_linears(model, kind)
            )
            text = (
                f"{place} decides the scaling of no linear layer of model.pattern={model.pattern}: none matches, or an "
            )
            text += f"earlier rule does. The linears are {', '.join(names) or 'none'}."
            found.append(Problem(key, text, f"Correct or remove it, or use {key}=[]."))
    return found


def rule_notes(model: ModelConfig, precision: PrecisionConfig) -> list[Problem]:
    """Rules for kinds of layers that the model does not have."""
    absent = [rule.kinds for rule in precision.rules if rule.kinds and not set(rule.kinds) & set(model.pattern)]
    if not absent:
        return []
    text = f"precision.rules has rules for layers of kind {', '.join(absent)}, which model.pattern={model.pattern} does not have."
    return [Problem("precision.rules", text)]


RECIPE_NAMES = {
    "delayed": "fp8_delayed",
    "current": "fp8_current",
    "blockwise": "fp8_blockwise",
    "unscaled": "fp8_unscaled",
}
"""{scaling: name for people, and of its option of the `precision` group}, where the two differ."""


def rounds_at_random(precision: PrecisionConfig) -> bool:
    """Whether some operand is rounded stochastically, which every rank does with numbers of its own."""
    scalings = [scaling_of(precision, name) for name in scalings_used(precision)]
    return any(one is not None and (one.grad.stochastic or one.grad_for_weight_grad.stochastic) for one in scalings)


def describe_precision(model: ModelConfig, precision: PrecisionConfig, *, tokens: int | None = None) -> str:
    """The precision that really runs, for people: `fp8_blockwise, 6 of 10 layers; ends bf16`. If no layer uses the low-precision
    format, it is not named first: `bf16; fp8_blockwise in none of 4 layers`. tokens: describe the step that starts after this
    many tokens; None: the whole run."""

    def words(scaling: str) -> str:
        name = RECIPE_NAMES.get(scaling, scaling)
        if scaling == "none":
            return precision.params
        if not low:
            return f"{precision.params}; {name} in none of {layers} layers"
        others = Counter(one for names in linear_scalings(model, precision, scaling).values() for one in names.values())
        del others[scaling]
        decided = rule_numbers(model, precision).values()
        kept = sum(precision.rules[number].scaling == "none" for names in decided for number in names.values())
        parts = [f"; {other} in {count} linears" for other, count in others.items()]
        parts += [f"; {precision.params} in {kept} linears"] * (kept > 0)
        ends = precision.high_precision_first + precision.high_precision_last
        return f"{name}, {low} of {layers} layers{''.join(parts)}" + (f"; ends {precision.params}" if ends else "")

    low, layers = len(low_precision_linears(model, precision)), len(layer_kinds(model.pattern))
    if tokens is not None:
        active = active_scaling(precision, tokens)
        return words("none" if active is None else active.name)
    text = words(precision.scaling)
    if precision.switch_at_tokens is not None:
        text += f"; from token {precision.switch_at_tokens:,}: {words(precision.scaling_after)}"
    return text


def active_scaling(precision: PrecisionConfig, tokens: int) -> Scaling | None:
    """The scaling of a step that starts after `tokens` tokens of training."""
    switched = precision.switch_at_tokens is not None and tokens >= precision.switch_at_tokens
    return scaling_of(precision, precision.scaling_after if switched else precision.scaling)


def linear_shapes(
    model: ModelConfig, kind: str, *, tensor: int = 1, expert_tensor: int = 1
) -> dict[str, tuple[int, int]]:
    """{name of each linear of a layer kind: (out, in) of one tensor rank's part}. Of routed experts: the matrix of one."""
    gates = 2 if model.activation in GATED else 1
    inner = model.mamba_heads * model.mamba_head_dim
    conv = inner + 2 * model.mamba_groups * model.mamba_state
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    experts, width = model.experts, model.experts.latent or model.hidden
    whole = {
        "M": ((inner + conv + model.mamba_heads, model.hidden), (model.hidden, inner)),
        "*": ((query + 2 * key, model.hidden), (model.hidden, query)),
        "w": ((query + 2 * key, model.hidden), (model.hidden, query)),
        "-": ((gates * model.ffn, model.hidden), (model.hidden, model.ffn)),
        "E": ((gates * experts.ffn, width), (width, experts.ffn)),
    }[kind]
    column, row = LINEARS[kind]  # Megatron splits the first linear by outputs (columns), the second by inputs (rows)
    ranks = expert_tensor if kind == "E" else tensor
    found = {column: (whole[0][0] // ranks, whole[0][1]), row: (whole[1][0], whole[1][1] // ranks)}
    if kind == "E" and experts.shared_ffn:
        shared = experts.shared_ffn // tensor
        found |= {SHARED_LINEARS[0]: (gates * shared, model.hidden), SHARED_LINEARS[1]: (model.hidden, shared)}
    return found


def _width_that_fits(model: ModelConfig, kind: str, tensor: int, multiple: int) -> str:
    """A remedy for the widths of a layer kind: one field, with the next larger value for which all widths are allowed."""
    if kind == "E":
        fields = "model.experts.ffn, shared_ffn and latent and model.hidden"
        return f"Use multiples of {multiple} for {fields} on each rank."
    name = {"M": "mamba_heads", "-": "ffn"}.get(kind, "head_dim")
    step = model.mamba_groups if kind == "M" else 1
    value = getattr(model, name)
    for wider in range(value + step - value % step, 2 * value + 64 * tensor, step):
        changed: dict[str, Any] = {name: wider}
        shapes = linear_shapes(replace(model, **changed), kind)
        column, row = (shapes[linear] for linear in LINEARS[kind])
        if all(size % multiple == 0 for size in (column[1], row[0])) and all(
            size % (tensor * multiple) == 0 for size in (column[0], row[1])
        ):
            return f"Use model.{name}={wider}, or lower parallel.tensor."
    return f"Use model.hidden={-(-model.hidden // multiple) * multiple}, or lower parallel.tensor."


def shape_problems(
    model: ModelConfig, *, parallel: ParallelConfig, precision: PrecisionConfig, rank_tokens: int
) -> list[Problem]:
    """Why a recipe's shapes cannot run in low precision on a GPU.

    rank_tokens: tokens of one microbatch on one rank (rows x tokens of a row / context ranks). cuBLASLt needs both dimensions
    of each FP8 matrix to be multiples of 16; for MXFP8 and NVFP4 it is 32. Under sequence parallelism, 128-blocks along tokens
    must not extend over two ranks.
    """
    layers = low_precision_linears(model, precision)
    if not layers:
        return []
    scalings = [scaling_of(precision, name) for name in scalings_used(precision)]
    active = [scaling for scaling in scalings if scaling is not None]
    multiple = max(scaling.multiple for scaling in active)
    names = "/".join(scaling.name for scaling in active)
    kinds = layer_kinds(model.pattern)
    problems = []
    for kind in dict.fromkeys(kinds[index] for index in layers):
        low = {name for index, linears in layers.items() if kinds[index] == kind for name in linears}
        for name, (out, into) in linear_shapes(
            model, kind, tensor=parallel.tensor, expert_tensor=parallel.expert_tensor
        ).items():
            if name not in low:
                continue
            for what, value in (("output", out), ("input", into)):
                if value % multiple:
                    text = (
                        f"precision.scaling={names}: {name} of `{kind}` layers has {what} width {value:,} on each of "
                        f"{parallel.tensor} tensor ranks, not a multiple of {multiple}."
                    )
                    remedy = _width_that_fits(model, kind, parallel.tensor, multiple)
                    problems.append(Problem("precision.scaling", text, remedy))
    if rank_tokens % multiple:
        problems.append(_tokens_problem(names, rank_tokens, multiple))
    blocks = [scaling.input.block for scaling in active if scaling.input.block is not None]
    if parallel.sequence and blocks and (rank_tokens // parallel.tensor) % max(along for _, along in blocks):
        along = max(along for _, along in blocks)
        text = (
            f"precision.scaling={names} with parallel.sequence=true: {rank_tokens:,} tokens over {parallel.tensor} tensor "
            f"ranks are {rank_tokens / parallel.tensor:g} each, not a multiple of the {along}-token block."
        )
        remedy = "Use parallel.sequence=false, a longer data.row_tokens or more run.microbatch_rows."
        problems.append(Problem("precision.scaling", text, remedy))
    return problems


def block_notes(model: ModelConfig, *, precision: PrecisionConfig, tensor: int) -> list[Problem]:
    """Linears whose quantised numbers depend on `parallel.tensor`.

    Blocks begin at the start of each rank's shard. If a shard is not a whole number of blocks, the blocks are not those of the
    whole matrix, and another degree rounds to other numbers.
    """
    wide = max(
        (extent for name in scalings_used(precision) for extent in _block_extents(scaling_of(precision, name))),
        default=1,
    )
    kinds, found = layer_kinds(model.pattern), []
    for kind in dict.fromkeys(kinds[index] for index in low_precision_linears(model, precision)):
        whole = linear_shapes(model, kind)
        for name, shape in linear_shapes(model, kind, tensor=tensor).items():
            cut = [
                (all_of, part)
                for all_of, part in zip(whole[name], shape, strict=True)
                if part != all_of and part % wide
            ]
            found += [f"{name} of `{kind}` ({all_of:,}: {part / wide:g} blocks a rank)" for all_of, part in cut]
    if not found:
        return []
    text = (
        f"blocks of {wide} begin at the shard of each of the {tensor} tensor ranks, and shards are not whole blocks for "
        f"{', '.join(found)}. With another parallel.tensor, the blocks and therefore the rounded numbers are different."
    )
    return [Problem("parallel.tensor", text, "Compare only runs of the same degree.")]


def _block_extents(scaling: Scaling | None) -> list[int]:
    """Extents of a scaling's blocks."""
    operands = (scaling.input, scaling.weight) if scaling is not None else ()
    return [extent for operand in operands for extent in operand.block or ()]


def rotation_problems(model: ModelConfig, *, precision: PrecisionConfig, rank_tokens: int) -> list[Problem]:
    """Numbers of tokens that NVFP4's Hadamard rotation cannot process on any backend: it rotates blocks of 16 tokens."""
    rotated = [
        scaling.name
        for scaling in (scaling_of(precision, name) for name in scalings_used(precision))
        if scaling is not None and scaling.grad_for_weight_grad.hadamard
    ]
    if not rotated or not low_precision_linears(model, precision) or rank_tokens % HADAMARD == 0:
        return []
    return [_tokens_problem(rotated[0], rank_tokens, HADAMARD)]


def _tokens_problem(names: str, rank_tokens: int, multiple: int) -> Problem:
    text = f"precision.scaling={names}: a microbatch has {rank_tokens:,} tokens per rank, not a multiple of {multiple}."
    return Problem("precision.scaling", text, "Change run.microbatch_rows or data.row_tokens.")

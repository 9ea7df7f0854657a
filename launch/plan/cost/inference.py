"""Memory of inference: weights, keys and values of attention layers, states of Mamba-2 layers.

Budgets for compression are given in this memory: Nemotron Nano 9B-v2 was pruned so that its weights and a context of 131,072
tokens fit on one A10G (arXiv 2508.14444, section 4).
"""

from bisect import bisect_right
from dataclasses import dataclass, replace

from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import counts, flops_per_token, mtp_kinds, parameters
from recipes.schema.units import GIB, gib
from recipes.schema.weight_formats import stored_linears, weight_format


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes on one device, for all sequences of a batch."""

    weights: float
    keys_values: float
    mamba_states: float
    """Scan state and the last inputs of the convolution. Does not depend on the context length."""

    @property
    def total(self) -> float:
        return self.weights + self.keys_values + self.mamba_states

    @property
    def gib(self) -> float:
        return self.total / GIB


def inference_memory(
    model: ModelConfig,
    *,
    context_tokens: int,
    batch: int = 1,
    weight_bytes: float = 2.0,
    cache_bytes: float = 2.0,
    quantized: str | None = None,
) -> InferenceMemory:
    """Memory of `batch` sequences of `context_tokens` each. weight_bytes, cache_bytes: size of one number (2 for bf16).

    quantized: format of the linear layers' weights (`recipes.schema.weight_formats`); scales have weight_bytes each.
    A `w` layer keeps only the keys and values of its window.
    """
    layers = counts(model.pattern)
    seen = layers["*"] * context_tokens + layers["w"] * min(context_tokens, model.window_tokens)
    inner = model.mamba_heads * model.mamba_head_dim
    conv = inner + 2 * model.mamba_groups * model.mamba_state
    state = inner * model.mamba_state + conv * (model.mamba_conv - 1)
    return InferenceMemory(
        weights=_weights(model, weight_bytes, quantized),
        keys_values=batch * cache_bytes * 2 * model.kv_heads * model.head_dim * seen,
        mamba_states=batch * cache_bytes * layers["M"] * state,
    )


def _weights(model: ModelConfig, weight_bytes: float, quantized: str | None) -> float:
    # A_log, D and dt_bias of Mamba-2 layers are fp32 in every format.
    scan = 3 * model.mamba_heads * (counts(model.pattern)["M"] + model.mtp.sets * mtp_kinds(model).count("M"))
    plain = weight_bytes * (parameters(model).total - scan) + SCAN_PARAMETER_BYTES * scan
    if quantized is None:
        return plain
    form = weight_format(quantized)
    shapes = [shape for _, _, shape in stored_linears(model)]
    dense = weight_bytes * sum(rows * columns for rows, columns in shapes)
    return plain - dense + sum(form.stored_bytes(shape, scale_bytes=int(weight_bytes)) for shape in shapes)


def roofline_tokens_per_s(
    model: ModelConfig, *, context_tokens: int, batch: int, gb_per_s: float, tflops: float
) -> float:
    """Upper bound of the tokens per second that all rows of a batch generate at a full context, in 16 bits.

    A step is limited by memory traffic (it reads all weights except the embedding, reads all caches, and writes the Mamba states)
    or by its matrix products. Efficiencies are not included: use the figure to rank shapes on one device, not as a prediction.
    """
    memory = inference_memory(model, context_tokens=context_tokens, batch=batch)
    embedding = 2 * parameters(model).embedding if model.has_own_head else 0
    unread = embedding + 2 * parameters(model).mtp
    traffic = memory.weights - unread + memory.keys_values + 2 * memory.mamba_states
    flops = flops_per_token(model, context_tokens)
    products = batch * (flops.total - flops.mtp) / 3
    return batch / max(traffic / (gb_per_s * 1e9), products / (tflops * 1e12))


@dataclass(frozen=True)
class CacheSizes:
    """Room for the texts of one inference engine (`train.inference`): the shapes of its pools."""

    rows: int
    """Texts that run at once."""
    context_tokens: int
    """Tokens of the longest text."""
    page_tokens: int
    """Tokens whose keys and values share a page."""
    pages: int
    """Pages of each `*` layer, for all texts together."""
    window_pages: int
    """Pages of each `w` layer."""
    snapshots: int = 0
    """Mamba-2 states stored at the ends of shared prefixes, in addition to one for each row."""
    trial_tokens: int = 0
    """Tokens of a step that may be taken back, of all rows: Mamba-2 layers store their inputs (speculation)."""

    @property
    def pages_of_a_text(self) -> int:
        """Entries of one text's page table."""
        return pages_for(self.context_tokens, self.page_tokens)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of an engine's pools on one tensor rank. They are allocated once and never grow."""

    keys_values: int
    mamba_states: int
    page_tables: int
    trial_inputs: int = 0
    """Inputs of Mamba-2 layers for tokens that may be taken back."""

    @property
    def total(self) -> int:
        return self.keys_values + self.mamba_states + self.page_tables + self.trial_inputs


SCAN_PARAMETER_BYTES = 4
STATE_BYTES = 4
"""Mamba-2 states are stored in fp32 whatever the model's format: in bf16 a state would lose 0.4 % at every token."""
TABLE_BYTES = 4
"""One entry of a page table: the number of a page."""


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that `tokens` tokens occupy."""
    return -(-tokens // page_tokens)


def window_pages_for(model: ModelConfig, *, context_tokens: int, page_tokens: int, step_tokens: int) -> int:
    """Pages of a `w` layer that one text needs: its window, the tokens read in one step, and the rest of a cut page."""
    longest = pages_for(model.window_tokens - 1 + step_tokens, page_tokens) + 1
    return min(longest, pages_for(context_tokens, page_tokens))


def page_bytes(model: ModelConfig, *, page_tokens: int, number_bytes: int, tensor: int = 1) -> int:
    """Bytes of one page, keys and values, of one attention layer on one tensor rank."""
    return 2 * page_tokens * (model.kv_heads // tensor) * model.head_dim * number_bytes


def state_bytes(model: ModelConfig, *, tensor: int = 1) -> int:
    """Bytes of one text's state in one Mamba-2 layer on one tensor rank: scan state and last inputs of the convolution."""
    inner = model.mamba_heads * model.mamba_head_dim
    conv = inner + 2 * model.mamba_groups * model.mamba_state
    return STATE_BYTES * (inner * model.mamba_state + conv * (model.mamba_conv - 1)) // tensor


def cache_bytes(model: ModelConfig, sizes: CacheSizes, *, number_bytes: int, tensor: int = 1) -> CacheBytes:
    """Bytes of the pools of an inference engine on one tensor rank, exact. number_bytes: of one key's number (2 for bf16)."""
    layers = counts(model.pattern)
    page = page_bytes(model, page_tokens=sizes.page_tokens, number_bytes=number_bytes, tensor=tensor)
    tables = (layers["*"] > 0) + (layers["w"] > 0)
    return CacheBytes(
        keys_values=page * (layers["*"] * sizes.pages + layers["w"] * sizes.window_pages),
        mamba_states=layers["M"] * (sizes.rows + sizes.snapshots) * state_bytes(model, tensor=tensor),
        page_tables=TABLE_BYTES * tables * sizes.rows * sizes.pages_of_a_text,
        trial_inputs=layers["M"] * sizes.trial_tokens * _inputs_bytes(model, tensor=tensor),
    )


def _inputs_bytes(model: ModelConfig, *, tensor: int) -> int:
    """Bytes of a Mamba-2 layer's inputs of one token after its in-projection (gate, convolution's inputs, steps)."""
    inner = model.mamba_heads * model.mamba_head_dim
    return STATE_BYTES * (2 * inner + 2 * model.mamba_groups * model.mamba_state + model.mamba_heads) // tensor


def draft_sizes(draft: ModelConfig, sizes: CacheSizes, *, step_tokens: int) -> CacheSizes:
    """Room of a draft model for the texts of an engine with these sizes: the same rows and pages, and one more state for each
    row, from which the draft continues after its guesses were taken back. The target may have no `*` layers, and so no pages.
    """
    layers = counts(draft.pattern)
    window = window_pages_for(
        draft, context_tokens=sizes.context_tokens, page_tokens=sizes.page_tokens, step_tokens=step_tokens
    )
    pages = sizes.pages or sizes.rows * sizes.pages_of_a_text
    return CacheSizes(
        sizes.rows, sizes.context_tokens, sizes.page_tokens, pages * bool(layers["*"]), sizes.rows * window * bool(layers["w"]),
        snapshots=sizes.rows * bool(layers["M"]),
    )  # fmt: skip


def cache_sizes(
    model: ModelConfig,
    *,
    rows: int,
    context_tokens: int,
    page_tokens: int,
    step_tokens: int,
    snapshots: int = 0,
    number_bytes: int,
    tensor: int = 1,
    budget_bytes: int | None = None,
    trial_tokens: int = 0,
    draft: ModelConfig | None = None,
) -> CacheSizes:
    """Sizes with which `rows` texts of `context_tokens` fit; with a budget per tensor rank that is smaller, as many pages of `*`
    layers as it has room for, at least those of one text.

    step_tokens: tokens read in one step at most. draft: a model in the same number format whose caches (`draft_sizes`) must fit
    too. Raises RecipeError if not even one text fits; it names the longest that does.
    """
    layers = counts(model.pattern)

    def sizes_of(context: int, texts: int) -> CacheSizes:
        window = window_pages_for(model, context_tokens=context, page_tokens=page_tokens, step_tokens=step_tokens)
        whole = texts * pages_for(context, page_tokens) * bool(layers["*"])
        windows = rows * window * bool(layers["w"])
        return CacheSizes(rows, context, page_tokens, whole, windows, snapshots, trial_tokens)

    def bytes_of(sizes: CacheSizes) -> int:
        found = cache_bytes(model, sizes, number_bytes=number_bytes, tensor=tensor).total
        if draft is not None:
            its_own = draft_sizes(draft, sizes, step_tokens=step_tokens)
            found += cache_bytes(draft, its_own, number_bytes=number_bytes, tensor=tensor).total
        return found

    most, least = sizes_of(context_tokens, rows), sizes_of(context_tokens, 1)
    if budget_bytes is None or bytes_of(most) <= budget_bytes:
        return most
    if bytes_of(least) <= budget_bytes:
        page = sum(
            counts(one.pattern)["*"]
            * page_bytes(one, page_tokens=page_tokens, number_bytes=number_bytes, tensor=tensor)
            for one in (model, *([draft] if draft is not None and layers["*"] else []))
        )
        return replace(most, pages=most.pages - -(-(bytes_of(most) - budget_bytes) // page))
    fitting = bisect_right(range(1, context_tokens), budget_bytes, key=lambda tokens: bytes_of(sizes_of(tokens, 1)))
    raise RecipeError(
        f"a text of {context_tokens:,} tokens needs {gib(bytes_of(least))} for keys, values and the states of {rows} rows, but "
        f"only {gib(budget_bytes)} is available. "
        + (f"The longest that fits has {fitting:,} tokens." if fitting else "Give more memory or fewer rows.")
    )

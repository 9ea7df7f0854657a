"""Work of one layer, or of the head, for one microbatch on one rank: matrix products, attention, scan, memory traffic, traffic
between GPUs. It does not depend on the GPU's speed; `launch.plan.cost.time` turns it into seconds.

A multiply-add is 2 FLOPs. `tokens` (T below) is the number of tokens of a microbatch on one context rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from recipes.schema.model import ModelConfig
from recipes.schema.pattern import ATTENTION, GATED, LayerKind, visible_keys
from recipes.schema.scaling import LINEARS, linear_shapes


@dataclass(frozen=True)
class Gemm:
    """One linear layer's forward product, [m, k] x [k, n]. Backward has two products of the same size."""

    m: int
    n: int
    k: int
    is_low: bool
    """Whether it runs in the recipe's low precision."""
    experts: int = 0
    """Number of routed experts whose matrices these are: each is multiplied by its part of the m rows, in one kernel. 0: one
    matrix."""
    scaling: str | None = None
    """Scaling of this linear, if it is not the layer's (`precision.rules`)."""

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1), which published models have and no recipe: queries, keys and
    values are made from small latents. A head has 128 numbers without and 64 with rotation, and 128 of a value."""

    keys: int
    """Width of the latent of keys and values."""
    query: int = 0
    """Width of the latent of queries; 0: they are made from the hidden state."""
    plain: int = 128
    rotated: int = 64

    def shapes(self, model: ModelConfig, tensor: int) -> list[tuple[int, int]]:
        """(out, in) of its linear layers on one tensor rank. Down-projections are not split."""
        heads, per_query = model.heads // tensor, self.plain + self.rotated
        queries = (
            [(self.query, model.hidden), (heads * per_query, self.query)]
            if self.query
            else [(heads * per_query, model.hidden)]
        )
        keys = [(self.keys + self.rotated, model.hidden), (heads * 2 * self.plain, self.keys)]
        return [*queries, *keys, (model.hidden, heads * self.plain)]

    def weights(self, model: ModelConfig) -> int:
        """Number of weights of one layer."""
        return sum(out * into for out, into in self.shapes(model, 1))


@dataclass(frozen=True)
class LayerWork:
    """One layer (or the head) on one rank for one microbatch. Memory bytes are for fused kernels and 2-byte formats."""

    gemms: tuple[Gemm, ...] = ()
    score_flops: float = 0.0
    """Products with keys and values in forward attention, without the masked half."""
    scan_flops: float = 0.0
    """The chunked scan, forward."""
    forward_bytes: float = 0.0
    """Device memory that elementwise kernels read and write, forward."""
    backward_bytes: float = 0.0
    tensor_bytes: float = 0.0
    """Size of each gathered or scattered activation: 2 bytes x T x hidden."""
    tensor_collectives: tuple[int, int] = (0, 0)
    """Number of all-gathers and reduce-scatters of that size over the tensor ranks, (forward, backward)."""
    ring_bytes: float = 0.0
    """Keys and values that a rank sends to the next in each of the context - 1 ring steps, forward (backward: twice as much)."""
    exchange_bytes: float = 0.0
    """All-to-all traffic of Mamba layers over the context ranks, forward (backward: the same)."""
    weights: int = 0
    """Number of weights in matrix products on this rank, without those of routed experts."""
    expert_weights: int = 0
    """Number of weights of routed experts on this rank."""
    routed_bytes: float = 0.0
    """Memory traffic of sorting rows by expert, and weighting and summing them, forward (4 of 9 parts) and backward."""
    expert_bytes: float = 0.0
    """Rows that this rank sends to experts, as bytes: once forward, and as many come back; backward the same."""
    expert_tensor_bytes: float = 0.0
    """Rows that the expert-tensor ranks gather before their experts, and scatter after; backward the same."""


def layer_work(
    kind: LayerKind,
    model: ModelConfig,
    *,
    tokens: int,
    sequence: int,
    tensor: int,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    split_sequence: bool,
    is_low: bool,
    scalings: Mapping[str, str] | None = None,
    latent: LatentAttention | None = None,
) -> LayerWork:
    """Work of one layer. tokens: T. sequence: tokens of a whole row, which a query can attend to. scalings: those of the linears
    that do not have the layer's. latent: the attention of the model, if it is not the recipe's.

    Loads of experts are taken as balanced.
    """
    share = tensor if split_sequence else 1
    gemms = tuple(_gemms(kind, model, tokens, share, tensor, expert, expert_tensor, is_low, scalings or {}))
    if latent is not None and kind in ATTENTION:
        gemms = tuple(Gemm(tokens, out, into, is_low) for out, into in latent.shapes(model, tensor))
    # In units of T x hidden: the norm reads one and writes one, the residual sum reads two and writes one. Backward, the norm
    # reads two and writes one, and the sum of gradients reads two and writes one.
    norm = 2.0 * model.hidden * tokens / share
    forward, backward = (7 * norm, 9 * norm) if model.post_norms else (5 * norm, 6 * norm)
    score_flops = scan_flops = ring = exchange = exchanged = gathered = routed = 0.0
    match kind:
        case "-":
            gates = 2 if model.activation in GATED else 1
            inner = 2.0 * model.ffn * tokens / tensor
            forward += (gates + 1) * inner  # reads the branches, writes the product
            backward += (
                2 * gates + 1
            ) * inner  # reads the branches and one gradient, writes a gradient for each branch
        case "E":
            experts = model.experts
            width, branches = experts.latent or model.hidden, 2 if model.activation in GATED else 1
            sent = tokens / share * experts.top_k
            inner = 2.0 * (sent * experts.ffn + tokens * experts.shared_ffn / tensor)
            rows = 2.0 * sent * width  # sorted by expert, and weighted and summed: each is read and written
            forward += (branches + 1) * inner
            backward += (2 * branches + 1) * inner
            routed = 9 * rows
            exchanged, gathered = rows, rows * expert_tensor
        case "*" | "w":
            query = model.heads * model.head_dim / tensor
            keys = model.kv_heads * model.head_dim / tensor
            if latent is not None:  # scores of 192 numbers and values of 128: their mean
                query = keys = model.heads * (latent.plain + latent.rotated / 2) / tensor
            window = model.window_tokens if kind == "w" else None
            score_flops = 4.0 * tokens * visible_keys(sequence, window=window) * query
            rotated = (query + keys) if model.position == "rope" else 0.0
            forward += 2.0 * tokens * (2 * query + 2 * rotated)  # copying queries out of the projection; rotation
            backward += 2.0 * tokens * (2 * query + 2 * rotated)
            if model.qk_norm:  # reads one and writes one; backward reads two and writes one
                forward += 2.0 * tokens * 2 * (query + keys)
                backward += 2.0 * tokens * 3 * (query + keys)
            ring = 2.0 * tokens * 2 * keys
        case "M":
            inner_width = model.mamba_heads * model.mamba_head_dim / tensor
            groups = model.mamba_groups / tensor
            conv = inner_width + 2 * groups * model.mamba_state
            chunk = min(model.mamba_chunk, sequence)
            scan_flops = tokens * (
                2.0 * chunk * model.mamba_state * groups
                + 2.0 * chunk * inner_width
                + 4.0 * model.mamba_state * inner_width
            )
            states = 4.0 * inner_width * model.mamba_state / chunk  # fp32, one state per chunk
            # Convolution, gate, norm and scan read and write their operands. States are written, passed between chunks, and read.
            forward += tokens * (2.0 * (2 * conv + 6 * inner_width) + 3 * states)
            backward += tokens * (2.0 * (5 * conv + 14 * inner_width) + 6 * states)
            steps = model.mamba_heads / tensor
            sent_groups = max(
                groups, context
            )  # Megatron repeats B and C where there are fewer groups than context ranks
            exchange = 2.0 * tokens * (2 * inner_width + 2 * sent_groups * model.mamba_state + steps + inner_width)
    # Of an expert layer, only the shared expert needs the tokens of all tensor ranks.
    is_split = tensor > 1 and (kind != "E" or model.experts.shared_ffn > 0)
    return LayerWork(
        gemms=gemms,
        score_flops=score_flops,
        scan_flops=scan_flops,
        forward_bytes=forward,
        backward_bytes=backward,
        tensor_bytes=2.0 * tokens * model.hidden,
        # Sequence parallel: an all-gather before the layer and a reduce-scatter after it; backward the same, and an all-gather of
        # the input for the weight gradient. Otherwise one all-reduce (a scatter and a gather) in each direction.
        tensor_collectives=((2, 3) if split_sequence else (2, 2)) if is_split else (0, 0),
        ring_bytes=ring,
        exchange_bytes=exchange,
        weights=sum(gemm.n * gemm.k for gemm in gemms if not gemm.experts),
        expert_weights=sum(gemm.n * gemm.k * gemm.experts for gemm in gemms),
        routed_bytes=routed,
        expert_bytes=exchanged if expert > 1 else 0.0,
        expert_tensor_bytes=gathered if expert_tensor > 1 else 0.0,
    )


def _gemms(
    kind: LayerKind,
    model: ModelConfig,
    tokens: int,
    share: int,
    tensor: int,
    expert: int,
    expert_tensor: int,
    is_low: bool,
    scalings: Mapping[str, str],
) -> Iterator[Gemm]:
    """The products of one layer on one rank. share: ranks over which the sequence is split."""
    shapes = linear_shapes(model, kind, tensor=tensor, expert_tensor=expert_tensor)
    experts, own = model.experts, -(-tokens // share)
    for name, (out, into) in shapes.items():
        scaling = scalings.get(name)
        low = is_low and scaling != "none"
        if name in LINEARS["E"]:
            rows = own * experts.top_k * expert_tensor
            yield Gemm(rows, out, into, low, experts=experts.count // expert, scaling=scaling)
        else:
            yield Gemm(tokens, out, into, low, scaling=scaling)
    if kind != "E":
        return
    yield Gemm(own, experts.count, model.hidden, False)
    if experts.latent:
        yield Gemm(own, experts.latent, model.hidden, False)
        yield Gemm(own, model.hidden, experts.latent, False)


def projection_work(model: ModelConfig, *, tokens: int, tensor: int) -> LayerWork:
    """Work of a further depth before its layers (`model.mtp`): norms of embedding and hidden state, projection, and the gather of
    its result over the tensor ranks."""
    width = 2.0 * tokens * model.hidden
    return LayerWork(
        gemms=(Gemm(tokens, model.hidden // tensor, 2 * model.hidden, is_low=False),),
        forward_bytes=8 * width,  # embedding written, two norms, concatenation
        backward_bytes=10 * width,
        tensor_bytes=width,
        tensor_collectives=(3, 3) if tensor > 1 else (0, 0),
        weights=2 * model.hidden * model.hidden // tensor,
    )


def head_work(model: ModelConfig, *, tokens: int, tensor: int, split_sequence: bool) -> LayerWork:
    """Work of final norm, output projection and cross-entropy. Logits have 2 bytes; the loss is computed in fp32.

    A scalar head is computed by every tensor rank. Sequence parallel: its input is gathered, again for the weight gradient, and
    the input's gradient is scattered. Otherwise that gradient is summed (an all-reduce).
    """
    vocab = 1 if model.head == "scalar" else model.vocab // tensor
    logits = float(tokens) * vocab
    return LayerWork(
        gemms=(Gemm(tokens, vocab, model.hidden, is_low=False),),
        forward_bytes=2.0 * 2 * tokens * model.hidden
        + 14.0 * logits,  # write 2; read 2 and write 4 (fp32); read for max and sum
        backward_bytes=2.0 * 3 * tokens * model.hidden + 10.0 * logits,
        tensor_bytes=2.0 * tokens * model.hidden,
        tensor_collectives=((1, 2) if split_sequence else (0, 2)) if tensor > 1 else (0, 0),
        weights=vocab * model.hidden,
    )

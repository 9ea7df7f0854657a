"""Importance scores of a model's parts, from forward passes over calibration rows. Pruning selects by these scores.

    calibration rows --> the model at any layout, with hooks --> sums over tokens, reduced over ranks --> Scores

Widths (Minitron, arXiv 2407.14679, section 3.1; Mamba-2: arXiv 2504.11409): the magnitude of an activation, averaged over
the tokens of a row, then the root of the sum of squares over rows. FFN neurons: the input of the second matrix. Query
heads: the norm of a head's output. Residual channels: the outputs of all norms in front of layers and head, summed. Mamba
channels: the x part of the in-projection's output.

Depth: the same pass measures block influence, 1 - cos(input, output). Removal scores take layers out one at a time, the
least harmful first, and compare logits (arXiv 2508.14444, section 4) or the next-token loss with the full model's.

The mean is taken over the full row before it is squared, even if several ranks share the row, and sums are float64. So the
scores depend on the layout only through the rounding of the forward pass.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.stream import Dataset
from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds
from train.compress.scores import Candidate, Removal, Scores
from train.distill.soft_targets import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES, Head, capped_logits
from train.engine import Engine, run_schedule
from train.model.head import head_weight, hidden_states
from train.objective.next_token import local_rows
from train.parallel.mesh import Mesh

ATTENTION = ("*", "w")
Reduce = Callable[[torch.Tensor], torch.Tensor]


class _Sums:
    """Running float64 sums by name. `rows` is 1 for rows of the current microbatch that count, 0 for padding rows."""

    def __init__(self) -> None:
        self.rows = torch.ones(0)
        self.tokens = 0
        """Tokens of a full row, over all context ranks."""
        self.values: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor) -> None:
        self.values[name] = self.values[name] + value if name in self.values else value

    def magnitude(self, name: str, x_SBC: torch.Tensor, reduce: Reduce) -> None:
        """Add sum over rows of (mean over tokens |x|)^2."""
        mean_BC = reduce(x_SBC.abs().sum(0, dtype=torch.float64)) / self.tokens
        self.add(name, (mean_BC.square() * self.rows[:, None]).sum(0))

    def square(self, name: str, x_SBC: torch.Tensor, reduce: Reduce) -> None:
        """Add sum over tokens of x^2."""
        squares_BC = reduce(x_SBC.float().square().sum(0, dtype=torch.float64))
        self.add(name, (squares_BC * self.rows[:, None]).sum(0))


@contextmanager
def _taps(chunk: Any, model: ModelConfig, sums: _Sums, mesh: Mesh) -> Iterator[None]:
    """Within the block, hooks on every layer of a chunk add statistics of its activations to `sums`."""
    splits_sequence = chunk.config.sequence_parallel
    tensor = mesh.groups.tp.size()

    def over(*groups: Any) -> Reduce:
        """Sums over the ranks that share the same rows."""

        def reduce(x: torch.Tensor) -> torch.Tensor:
            for group in groups:
                if group.size() > 1:
                    dist.all_reduce(x, group=group)
            return x

        return reduce

    # Context parallelism splits all tensors along the sequence; sequence parallelism splits only the residual stream.
    stream = over(mesh.groups.cp, *([mesh.groups.tp] if splits_sequence else []))
    inner = over(mesh.groups.cp)
    hooks = []

    def on_output(module: Any, act: Callable[[torch.Tensor], None]) -> None:
        hooks.append(module.register_forward_hook(lambda _m, _i, out: act(out[0] if isinstance(out, tuple) else out)))

    def on_input(module: Any, act: Callable[[torch.Tensor], None]) -> None:
        hooks.append(module.register_forward_pre_hook(lambda _m, inputs: act(inputs[0])))

    def norm(site: str, module: Any, *, ranks_channels: bool) -> None:
        on_input(module, lambda x: sums.square(f"energy/{site}", x, stream))
        if ranks_channels:
            on_output(module, lambda x: sums.magnitude("hidden", x, stream))

    def tap_layer(layer: Any, kind: str) -> None:
        number = layer.layer_number - 1
        place = f"decoder.layers.{number}"
        if kind == "M":
            norm(f"{place}.norm", layer.norm, ranks_channels=True)
            mixer = layer.mixer
            width = model.mamba_heads * model.mamba_head_dim // tensor
            on_output(mixer.in_proj, lambda x: sums.magnitude(f"{number}/mamba", x[..., width : 2 * width], inner))
            on_input(mixer.norm, lambda x: sums.square(f"energy/{place}.mixer.norm", x, inner))
        elif kind in ATTENTION:
            norm(f"{place}.input_layernorm", layer.input_layernorm, ranks_channels=True)

            def heads(x_SBD: torch.Tensor) -> None:
                by_head = x_SBD.float().unflatten(-1, (-1, model.head_dim)).norm(dim=-1)
                sums.magnitude(f"{number}/heads", by_head, inner)

            on_input(layer.self_attention.linear_proj, heads)
        else:
            norm(f"{place}.pre_mlp_layernorm", layer.pre_mlp_layernorm, ranks_channels=True)
            on_input(layer.mlp.linear_fc2, lambda x: sums.magnitude(f"{number}/ffn", x, inner))
        if model.post_norms:
            norm(f"{place}.post_norm", layer.post_norm, ranks_channels=False)

        entering: list[torch.Tensor] = []  # the input of the layer call in progress

        def enter(_module: Any, _inputs: Any, arguments: dict[str, Any]) -> None:
            entering[:] = [arguments["hidden_states"]]

        def leave(out: torch.Tensor) -> None:
            cosine_SB = torch.nn.functional.cosine_similarity(entering.pop().float(), out.float(), dim=-1)
            total_B = stream((1 - cosine_SB).sum(0, dtype=torch.float64))
            sums.add(f"{number}/influence", (total_B * sums.rows).sum()[None])

        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        on_output(layer, leave)

    kinds = layer_kinds(model.pattern)
    for layer in chunk.decoder.layers:
        tap_layer(layer, kinds[layer.layer_number - 1])
    if chunk.post_process:
        norm("decoder.final_norm", chunk.decoder.final_norm, ranks_channels=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def width_scores(engine: Engine, model: ModelConfig, dataset: Dataset, *, rows: int, parent: str) -> Scores:
    """All scores except removals, over the first `rows` training rows. Collective; every rank gets the same."""
    mesh = engine.mesh
    sums = _Sums()
    sums.tokens = engine.row_tokens
    microbatches, counts = _calibration(dataset, rows, engine)
    counting = {id(chunk): iter(counts) for chunk in engine.chunks}  # each chunk sees the microbatches in order

    def step(iterator: Any, chunk: Any) -> Any:
        sums.rows = next(counting[id(chunk)])
        mine = local_rows(next(iterator), mesh, reset_at_documents=engine.reset_at_documents)
        with _taps(chunk, model, sums, mesh):
            output = hidden_states(chunk, mine.tokens, mine.positions, context=mine.context)
        return output, _no_loss

    with torch.no_grad():
        run_schedule(engine, microbatches, forward_step=step, forward_only=True)
    merged = _merge(sums.values, model, mesh)
    plain = json.loads(json.dumps(asdict(model)))  # as it will be read back: lists, not tuples
    scores = Scores(model=plain, parent=parent, rows=rows)
    tokens = rows * engine.row_tokens
    kinds = layer_kinds(model.pattern)
    scores.hidden = np.sqrt(merged["hidden"])
    scores.energy = {
        name.removeprefix("energy/"): x / tokens for name, x in merged.items() if name.startswith("energy/")
    }
    scores.influence = np.array([float(merged[f"{n}/influence"][0]) / tokens for n in range(len(kinds))])
    for number, kind in enumerate(kinds):
        what = {"M": "mamba", "-": "ffn"}.get(kind, "heads")
        values = np.sqrt(merged[f"{number}/{what}"])
        if what == "mamba":
            values = values.reshape(model.mamba_heads, model.mamba_head_dim)
        scores.layers[number] = {what: values}
    return scores


def removal_scores(
    engine: Engine,
    model: ModelConfig,
    dataset: Dataset,
    *,
    rows: int,
    remove: int,
    attention_layers: int | None,
    metric: str,
    before: Sequence[Removal] = (),
) -> Iterator[Removal]:
    """Remove `remove` layers one at a time, the least harmful by `metric` first; yields each round when it is done.

    attention_layers: how many must be left at the end; None leaves it to the metric. metric: `logit_mse`, `perplexity`.
    before: rounds of the same request that are done already. Collective; every rank gets the same.
    """
    kinds = layer_kinds(model.pattern)
    quota = attention_quota(kinds, remove, attention_layers)
    compare = _Comparison(engine, model, dataset, rows)
    removed = [removal.layer for removal in before]
    while len(removed) < remove:
        left = remove - len(removed)
        of_attention = sum(kinds[n] in ATTENTION for n in removed)
        allowed = [n for n in range(len(kinds)) if n not in removed]
        # Keep the quota reachable: once it is used up, or as soon as only attention layers may still be removed.
        if quota is not None and of_attention == quota:
            allowed = [n for n in allowed if kinds[n] not in ATTENTION]
        elif quota is not None and quota - of_attention == left:
            allowed = [n for n in allowed if kinds[n] in ATTENTION]
        candidates = [compare.without({*removed, layer}, layer) for layer in allowed]
        harm = {c.layer: c.logit_error if metric == "logit_mse" else c.loss_increase for c in candidates}
        taken = min(harm, key=lambda n: (harm[n], n))
        removed.append(taken)
        yield Removal(taken, candidates)


def attention_quota(kinds: list[Any], remove: int, attention_layers: int | None) -> int | None:
    """How many of the `remove` layers must be attention layers so that `attention_layers` are left; None: no constraint.

    RecipeError if that is impossible.
    """
    if attention_layers is None:
        return None
    have = sum(kind in ATTENTION for kind in kinds)
    quota = have - attention_layers
    if quota < 0 or quota > remove or remove - quota > len(kinds) - have:
        least, most = max(0, have - remove), min(have, len(kinds) - remove)
        raise RecipeError(
            f"compress.attention_layers={attention_layers}: the model has {have} attention layers of {len(kinds)}, of which "
            f"{len(kinds) - remove} stay (compress.layers). Use {least if least == most else f'{least} to {most}'}."
        )
    return quota


class _Comparison:
    """Holds the full model's final hidden states of the calibration rows, and compares shortened models with it."""

    def __init__(self, engine: Engine, model: ModelConfig, dataset: Dataset, rows: int) -> None:
        self.engine, self.model = engine, model
        self.microbatches, self.counts = _calibration(dataset, rows, engine)
        self.tokens = rows * engine.row_tokens
        self.whole: list[torch.Tensor] = []
        self._run(set(), lambda index, hidden_SBH: self.whole.append(hidden_SBH))
        self.loss = self._compare(set())[2]

    def without(self, removed: set[int], layer: int) -> Candidate:
        """The model without `removed`. Collective over the world."""
        error, square, loss = self._compare(removed)
        return Candidate(layer, logit_error=error / square, loss_increase=(loss - self.loss) / self.tokens)

    def _compare(self, removed: set[int]) -> tuple[float, float, float]:
        """(sum of squared logit differences, of squared logits, of next-token losses) over all rows."""
        mesh, model = self.engine.mesh, self.model
        sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)

        def compare(index: int, hidden_SBH: torch.Tensor) -> None:
            chunk = self.engine.chunks[-1]
            rows = local_rows(self.microbatches[index], mesh, reset_at_documents=self.engine.reset_at_documents)
            head = Head.of(head_weight(chunk), model, group=mesh.groups.tp)
            weights_SB = self.counts[index].expand(hidden_SBH.shape[0], -1)
            states = (hidden_SBH, self.whole[index])
            sums.add_(_logit_sums(states, rows.labels.t(), weights_SB, head, mesh))

        self._run(removed, compare)
        error, square, loss = mesh.sum_over_world(sums).tolist()
        return (
            error,
            square,
            loss / mesh.layout.tensor,
        )  # tensor ranks have disjoint slices of the logits, but all have the same losses

    def _run(self, removed: set[int], act: Callable[[int, torch.Tensor], None]) -> None:
        """Run the model without some layers. On the last stage, `act` gets the final hidden states of each microbatch."""
        mesh = self.engine.mesh
        indices = iter(range(len(self.microbatches)))

        def step(iterator: Any, chunk: Any) -> Any:
            mine = local_rows(next(iterator), mesh, reset_at_documents=self.engine.reset_at_documents)
            with _without_layers(chunk, removed):
                output = hidden_states(chunk, mine.tokens, mine.positions, context=mine.context)

            def take(hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                whole = hidden_SBH
                if chunk.config.sequence_parallel:
                    parts = [torch.empty_like(hidden_SBH) for _ in range(mesh.groups.tp.size())]
                    dist.all_gather(parts, hidden_SBH.contiguous(), group=mesh.groups.tp)
                    whole = torch.cat(parts)
                act(next(indices), whole)
                return _no_loss(hidden_SBH)

            return output, take

        with torch.no_grad():
            run_schedule(self.engine, self.microbatches, forward_step=step, forward_only=True)


def _logit_sums(
    states: tuple[torch.Tensor, torch.Tensor], labels_SB: torch.Tensor, weights_SB: torch.Tensor, head: Head, mesh: Mesh
) -> torch.Tensor:
    """float64 sums: squared logit differences and squared logits of the full model, both of this vocabulary slice, and the
    next-token loss of the whole vocabulary."""
    group = mesh.groups.tp
    shorter, whole = (state.flatten(0, 1) for state in states)
    labels, weights = labels_SB.reshape(-1), weights_SB.reshape(-1)
    vocab = head.slice_size
    budget = CPU_CHUNK_BYTES if shorter.device.type == "cpu" else GPU_CHUNK_BYTES
    size = max(16, budget // (4 * vocab))
    local = labels - group.rank() * vocab
    is_here = (local >= 0) & (local < vocab)
    local = torch.where(is_here, local, 0)
    sums = torch.zeros(3, dtype=torch.float64, device=shorter.device)
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        z, reference = capped_logits(shorter[part], head), capped_logits(whole[part], head)
        at_label = z.gather(1, local[part, None]).squeeze(1) * is_here[part]
        largest = z.max(dim=1).values
        if group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exponentials = (z - largest[:, None]).exp_().sum(1)
        both = torch.stack([exponentials, at_label])
        if group.size() > 1:
            dist.all_reduce(both, group=group)
        loss = largest + both[0].log() - both[1]
        per_token = torch.stack([(z - reference).square_().sum(1), reference.square_().sum(1), loss])
        sums += (per_token * weights[part]).sum(1, dtype=torch.float64)
    return sums


@contextmanager
def _without_layers(chunk: Any, removed: set[int]) -> Iterator[None]:
    """Within the block, the chunk runs without some layers (whole-model numbers); the residual stream skips them."""
    layers = chunk.decoder.layers
    chunk.decoder.layers = torch.nn.ModuleList([layer for layer in layers if layer.layer_number - 1 not in removed])
    try:
        yield
    finally:
        chunk.decoder.layers = layers


def _calibration(dataset: Dataset, rows: int, engine: Engine) -> tuple[list[Any], list[torch.Tensor]]:
    """This data rank's microbatches of the first `rows` training rows, and for each a 0/1 weight per row.

    Data ranks take microbatches in turn. The last ones are padded with rows of weight 0, so that all have the same shape.
    """
    layout, size = engine.mesh.layout, engine.microbatch_rows
    per_turn = size * layout.data
    together = layout.pipeline if layout.virtual > 1 else 1  # the interleaved schedule needs a multiple of the stages
    turns = -(-rows // (per_turn * together)) * together
    microbatches, counts = [], []
    for turn in range(turns):
        positions = np.arange(size) + turn * per_turn + engine.mesh.data_rank * size
        counts.append(torch.from_numpy((positions < rows).astype(np.float64)).to(engine.mesh.device))
        microbatches.append(dataset.training_rows(np.where(positions < rows, positions, 0)))
    return microbatches, counts


def _merge(values: dict[str, torch.Tensor], model: ModelConfig, mesh: Mesh) -> dict[str, np.ndarray]:
    """Sum over data ranks and stages, concatenate the slices of tensor ranks. Collective; every rank gets the same."""
    mine = (mesh.groups.dp.rank(), mesh.groups.cp.rank(), mesh.groups.tp.rank(), mesh.groups.pp.rank())
    local = {name: value.cpu().numpy() for name, value in values.items()}
    everyone: list[Any] = [(mine, local)]
    if mesh.layout.world > 1:
        everyone = [None] * mesh.layout.world
        dist.all_gather_object(everyone, (mine, local))
    # The hooks have already reduced over context ranks: take context rank 0 only.
    ranks = sorted(((key, found) for key, found in everyone if key[1] == 0), key=lambda pair: pair[0])
    merged: dict[str, np.ndarray] = {}
    for data in range(mesh.layout.data):
        for stage in range(mesh.layout.pipeline):
            slices = [found for (d, _, _, p), found in ranks if d == data and p == stage]
            for name in slices[0]:
                is_cut = name.endswith(("/ffn", "/heads", "/mamba", ".mixer.norm"))
                value = np.concatenate([s[name] for s in slices]) if is_cut else slices[0][name]
                merged[name] = merged[name] + value if name in merged else value
    return merged


def _no_loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss function of forward passes without a loss; Megatron's schedules require one."""
    zero = output.new_zeros(())
    return zero, zero

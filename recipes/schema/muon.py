"""The matrices that Muon (`optim.kind=muon`) updates in a layer, and the cost of orthogonalizing one."""

from recipes.schema.model import ModelConfig
from recipes.schema.optim import MuonConfig
from recipes.schema.scaling import GATED, linear_shapes


def layer_matrices(model: ModelConfig, kind: str, *, muon: MuonConfig) -> list[tuple[int, int, int]]:
    """(count, rows, columns) of the whole matrices of a layer: fused projections apart, unless `muon.split_fused` is false."""
    experts, hidden = model.experts, model.hidden
    branches = 2 if model.activation in GATED else 1
    found: list[tuple[int, int, int]] = []
    for name, (rows, columns) in linear_shapes(model, kind).items():
        count, sizes = experts.count if "mlp.experts" in name else 1, [rows]
        if muon.split_fused and name.endswith("linear_fc1"):
            sizes = [rows // branches] * branches
        elif muon.split_fused and name.endswith("linear_qkv"):
            sizes = [model.heads * model.head_dim, *[model.kv_heads * model.head_dim] * 2]
        elif muon.split_fused and name.endswith("in_proj"):
            inner, state = model.mamba_heads * model.mamba_head_dim, model.mamba_groups * model.mamba_state
            sizes = [inner, inner, state, state, model.mamba_heads]
        found += [(count, size, columns) for size in sizes]
    if kind == "E":
        found.append((1, experts.count, hidden))  # the router
        found += [(1, experts.latent, hidden), (1, hidden, experts.latent)] if experts.latent else []
    return found


def iteration_cost(rows: int, columns: int) -> int:
    """Multiplications of one Newton-Schulz iteration of a matrix: two products with its wider side, one of small squares."""
    m, n = sorted((rows, columns))
    return 2 * m * m * n + m**3

"""Names of a model's parameters, and which rule of `optim.groups` applies to each.

Names are those of the whole model, with layers counted from 0: `decoder.layers.3.mixer.A_log`. The first rule whose pattern
matches a name applies to it.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from recipes.schema.encoders import encoder_weights
from recipes.schema.errors import Problem
from recipes.schema.lora import adapter_prefixes
from recipes.schema.model import ModelConfig
from recipes.schema.optim import ParameterGroupConfig
from recipes.schema.pattern import ATTENTION, layer_kinds, mtp_kinds

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
_ATTENTION = ("input_layernorm.weight", "self_attention.linear_proj.weight", "self_attention.linear_qkv.weight")
_LAYERS: dict[str, tuple[str, ...]] = {
    "M": (
        "norm.weight", "mixer.in_proj.weight", "mixer.conv1d_weight", "mixer.conv1d_bias", "mixer.dt_bias", "mixer.A_log",
        "mixer.D", "mixer.norm.weight", "mixer.out_proj.weight",
    ),
    "*": _ATTENTION,
    "w": _ATTENTION,
    "-": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
    "E": (
        "pre_mlp_layernorm.weight", "mlp.router.weight", "mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc2.weight",
    ),
}  # fmt: skip
_SHARED = ("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight")
_LATENT = ("mlp.latent_in.weight", "mlp.latent_out.weight")


def parameter_names(model: ModelConfig) -> list[str]:
    """Every parameter of a model that is trained. A tied head has no name of its own."""
    if model.lora.rank:
        prefixes = adapter_prefixes(model.lora, layer_kinds(model.pattern))
        return [prefix + part for prefix in prefixes for part in ("down", "up")]
    found = [EMBEDDING, *_layer_names(model, layer_kinds(model.pattern), "decoder.layers")]
    for depth in range(model.mtp.sets):
        prefix = f"mtp.layers.{depth}"
        found += [f"{prefix}.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")]
        found += _layer_names(model, mtp_kinds(model), f"{prefix}.mtp_model_layer.layers")
    found += encoder_weights(model.vision, model.audio, model.hidden)
    return [*found, "decoder.final_norm.weight", *([HEAD] if model.has_own_head else [])]


def _layer_names(model: ModelConfig, kinds: Sequence[str], prefix: str) -> list[str]:
    found = []
    for index, kind in enumerate(kinds):
        names = list(_LAYERS[kind])
        if kind == "E":
            names += [*(_SHARED if model.experts.shared_ffn else ()), *(_LATENT if model.experts.latent else ())]
        if model.qk_norm and kind in ATTENTION:
            names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
        names += ["post_norm.weight"] * model.post_norms
        found += [f"{prefix}.{index}.{name}" for name in names]
    return found


def rule_of(groups: Sequence[ParameterGroupConfig], name: str) -> int | None:
    """Index of the first rule whose pattern matches a parameter's name."""
    return next((index for index, group in enumerate(groups) if fnmatchcase(name, group.match)), None)


def group_problems(groups: Sequence[ParameterGroupConfig], model: ModelConfig) -> list[Problem]:
    """Rules that do nothing: they match no parameter, only those of earlier rules, or change nothing."""
    found = []
    names = parameter_names(model) if groups else []
    used = {rule_of(groups, name) for name in names}
    for index, group in enumerate(groups):
        key = f"optim.groups[{index}]"
        matched = [name for name in names if fnmatchcase(name, group.match)]
        if not matched:
            text = f"{key}.match={group.match!r} matches no parameter of this model."
            remedy = f"Names look like {names[0]} and {names[1]}; `*` stands for any characters."
            found.append(Problem(f"{key}.match", text, remedy))
        elif index not in used:
            text = f"{key}.match={group.match!r} matches only parameters of earlier rules, e.g. {matched[0]}."
            found.append(
                Problem(f"{key}.match", text, "The first rule that matches applies. Put narrow patterns first.")
            )
        elif group.lr_factor == 1.0 and group.weight_decay is None:
            text = f"{key} (match={group.match!r}) sets neither lr_factor nor weight_decay, so it does nothing."
            found.append(Problem(key, text, "Set one of them, or leave the rule out."))
    return found

"""Conversion between a model's shape and Hugging Face's config.json. Unknown values of known fields are errors.

    ModelConfig --family_of--> "nemotron_h" | "gemma2" | RecipeError naming the fields that neither supports
    ModelConfig --to_config--> dict for config.json        config.json --from_config--> ModelConfig

Each family has fields that are ours under another name, and fields with one fixed value because our layers do only that.
A config with another value there is refused, naming the field.

transformers' Nemotron-H clamps dt from below at `time_step_min` (0.001 in the published configs); Megatron, which trained
the published weights, and this project do not. An exported config sets it to 1e-30, which clamps nothing, so that
transformers computes the function that was trained. It is not 0 because random initialization takes its logarithm.
"""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.schema.errors import RecipeError
from recipes.schema.experts import ExpertsConfig
from recipes.schema.foreign import printable, read_json
from recipes.schema.model import ModelConfig
from recipes.schema.mtp import MtpConfig
from recipes.schema.pattern import kinds_of, layer_kinds
from recipes.schema.typed import FieldError, build
from train.hf.mapping import Family

log = logging.getLogger(__name__)

CONFIG = "config.json"
NO_CLAMP = 1e-30
_MOST_LAYERS = 10_000
_SHOWN = 300
"""Characters of a config's value that a message shows."""
_LARGEST_SIZE = 1 << 24
"""Bound on sizes in a config, so that a hostile one cannot make this program loop or allocate without end: some 60 times the
largest vocabulary that is published (256,000)."""


@dataclass(frozen=True)
class SpecialTokens:
    """Special token ids of Hugging Face's configs and tokenizers; None without one."""

    bos: int | None
    eos: int | None
    pad: int | None


_CLASSES: dict[Family, str] = {"nemotron_h": "NemotronHForCausalLM", "gemma2": "Gemma2ForCausalLM"}

_SCORED = "Gemma2ForSequenceClassification"
"""The class of a reward model: one label, whose logit is the reward. transformers has none for Nemotron-H."""

_SHARED = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "initializer_range": "init_std",
}
_NAMES: dict[Family, dict[str, str]] = {
    "nemotron_h": _SHARED
    | {
        "layer_norm_epsilon": "norm_eps",
        "mamba_num_heads": "mamba_heads",
        "mamba_head_dim": "mamba_head_dim",
        "ssm_state_size": "mamba_state",
        "n_groups": "mamba_groups",
        "conv_kernel": "mamba_conv",
        "chunk_size": "mamba_chunk",
    },
    "gemma2": _SHARED
    | {
        "rms_norm_eps": "norm_eps",
        "sliding_window": "window_tokens",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    },
}
"""Their name -> our field, for fields with equal values."""

_EXPERTS = {
    "n_routed_experts": "count",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "ffn",
    "moe_shared_expert_intermediate_size": "shared_ffn",
    "n_group": "groups",
    "topk_group": "top_groups",
    "routed_scaling_factor": "scaling",
}
"""The same for `model.experts`, if the pattern has `E` layers. Their number of shared experts is not used by the class."""

_FIXED: dict[Family, dict[str, Any]] = {
    "nemotron_h": {
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "mamba_hidden_act": "silu",
        "tie_word_embeddings": False,
        "sliding_window": None,
        "residual_in_fp32": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "gemma2": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
"""Fields with the one value that our layers support."""

_WRITTEN: dict[Family, dict[str, Any]] = {
    "nemotron_h": {
        "expand": 2,  # unused by the class: the inner width is mamba_num_heads x mamba_head_dim
        "mamba_ssm_cache_dtype": "float32",
        "num_logits_to_keep": 1,
        "rescale_prenorm_residual": True,
        "time_step_min": NO_CLAMP,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "use_cache": True,
        "use_mamba_kernels": True,
    },
    "gemma2": {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "use_cache": True},
}
"""Fields that do not change what our model computes; ignored when a config is read."""

_NOT_READ = (
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
    "transformers_version", "quantization_config", "model_type", "vocab_size", "num_hidden_layers", "max_position_embeddings",
    "hybrid_override_pattern", "layers_block_type", "layer_types", "mlp_hidden_act", "attention_head_dim",
    "rms_norm_eps", "query_pre_attn_scalar", "rope_theta", "rope_parameters", "rope_scaling", "time_step_limit",
    "sliding_window_size", "_attn_implementation", "attn_implementation",
    *_EXPERTS, "moe_latent_size", "moe_shared_expert_overlap", "mtp_layers_block_type",
    "mtp_hybrid_override_pattern", "num_nextn_predict_layers",
    "n_shared_experts", "norm_topk_prob", "output_router_logits",
)  # fmt: skip
"""Fields that other functions below read, or that do not affect the function computed."""

_LABELS = ("num_labels", "id2label", "label2id")
"""Fields for classification. transformers builds a table of `num_labels` texts, of whatever size a config gives."""
_ACTIVATIONS = {"squared_relu": "relu2", "gelu": "gelu_pytorch_tanh", "silu": "silu"}
_LAYERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLD_LAYERS = {"mamba": "M", "attention": "*"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def family_of(model: ModelConfig) -> Family:
    """The family whose class computes this model. RecipeError names the fields that exclude it from each family."""
    problems: dict[Family, list[str]] = {"nemotron_h": _not_nemotron(model), "gemma2": _not_gemma(model)}
    for family, found in problems.items():
        if not found:
            return family
    listed = "\n".join(f"  {_CLASSES[family]}: {'; '.join(found)}" for family, found in problems.items())
    raise RecipeError(f"no class of transformers computes this model without extra code:\n{listed}")


def to_config(
    model: ModelConfig, *, tokens: SpecialTokens, max_positions: int, dtype: str, vocab: int | None = None
) -> dict[str, Any]:
    """config.json of a model, keys sorted. dtype: torch's name of the stored format. vocab: theirs; None: ours unpadded."""
    family = family_of(model)
    kinds = layer_kinds(model.pattern)
    config: dict[str, Any] = {
        "architectures": [_CLASSES[family] if model.head == "vocabulary" else _SCORED],
        "model_type": family,
        "vocab_size": model.real_vocab if vocab is None else vocab,
        "max_position_embeddings": max_positions,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "torch_dtype": dtype,
        **{theirs: getattr(model, ours) for theirs, ours in _NAMES[family].items()},
        **_FIXED[family],
        **_WRITTEN[family],
    }
    match family:
        case "nemotron_h":
            config |= {
                "hybrid_override_pattern": "".join(kinds),
                "num_hidden_layers": len(kinds),
                "mlp_hidden_act": _ACTIVATIONS[model.activation],
                "rms_norm_eps": model.norm_eps,
            }
            config |= {"num_nextn_predict_layers": model.mtp.sets}
            if model.mtp.depths:
                config |= {"mtp_hybrid_override_pattern": model.mtp.pattern}
            if "E" in kinds_of(model):
                experts = model.experts
                config |= {theirs: getattr(experts, ours) for theirs, ours in _EXPERTS.items()}
                config |= {"moe_latent_size": experts.latent or None, "n_shared_experts": 1}
                config |= {"norm_topk_prob": experts.top_k > 1, "moe_shared_expert_overlap": False}
        case "gemma2":
            attention = [kind for kind in kinds if kind != "-"]
            config |= {
                "num_hidden_layers": len(attention),
                "layer_types": ["sliding_attention" if kind == "w" else "full_attention" for kind in attention],
                "query_pre_attn_scalar": int(model.query_scale or model.head_dim),
                "rope_theta": model.rope_base,
                "rope_parameters": _rope(model),
            }
    if model.head == "scalar":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # as transformers writes one label
    return dict(sorted(config.items()))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory. RecipeError if it is missing or damaged."""
    path = folder / CONFIG
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}. Give a directory in Hugging Face's format.") from error
    if not isinstance(config, dict):
        raise RecipeError(f"{path} is not an object of fields but {type(config).__name__}. Copy the file again.")
    return config


def from_config(config: dict[str, Any], *, where: str) -> ModelConfig:
    """The model a config.json describes. RecipeError lists every field that is missing or not supported."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _CLASSES:
        shown = printable(repr(family), most=_SHOWN)
        raise RecipeError(f"{where}: model_type={shown} is not supported. Supported: {', '.join(_CLASSES)}.")
    problems: list[str] = []
    for key, value in _FIXED[family].items():
        if key in config and config[key] != value and (config[key] or value):  # null, false and 0 all mean "not used"
            problems.append(f"{key}={config[key]!r}: only {value!r} is supported")
    known = {*_FIXED[family], *_WRITTEN[family], *_NAMES[family], *_NOT_READ, *_LABELS}
    if strange := sorted(config.keys() - known):
        log.warning("%s: ignored fields: %s", where, printable(", ".join(strange), most=1000))

    def need(key: str, *others: str) -> Any:
        for name in (key, *others):
            if name in config:
                return config[name]
        problems.append(f"{key} is missing")
        return None

    positions = config.get("max_position_embeddings", 1)
    if not isinstance(positions, int) or positions < 1:
        problems.append(f"max_position_embeddings={positions!r} is not a positive whole number")
    fields = {ours: need(theirs) for theirs, ours in _NAMES[family].items() if theirs != "head_dim"}
    fields["head_dim"] = need("head_dim", "attention_head_dim")
    fields["head"] = _head_of(config, problems)
    fields["vocab"] = need("vocab_size")
    for name, value in fields.items():
        if isinstance(value, int) and value > _LARGEST_SIZE:
            problems.append(f"model.{name} would be {value}: the largest size that is read is {_LARGEST_SIZE:,}")
    if family == "nemotron_h":
        fields["pattern"] = _nemotron_pattern(config, problems)
        _check_bounds(config, problems)
        mtp = _mtp_of(config, problems)
        fields["mtp"] = asdict(mtp)
        if "E" in (fields["pattern"] or "") or (mtp.depths and "E" in mtp.pattern):
            fields["experts"] = _experts_of(config, problems)
        acts = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
        act = need("mlp_hidden_act")
        fields["activation"] = acts.get(act) if isinstance(act, str) else None
        if act is not None and fields["activation"] is None:
            problems.append(f"mlp_hidden_act={act!r}: supported are {', '.join(acts)}")
    else:
        fields |= _gemma_fields(config, problems)
        scale = need("query_pre_attn_scalar")
        fields["query_scale"] = None if scale == fields["head_dim"] else scale
    if problems:
        lines = "\n  ".join(printable(problem, most=_SHOWN) for problem in problems)
        raise RecipeError(f"{where} cannot be converted:\n  {lines}")
    try:
        return build(ModelConfig, fields, "model")
    except FieldError as error:
        lines = "\n".join(printable(line, most=_SHOWN) for line in str(error).splitlines())
        raise RecipeError(f"{where} cannot be converted:\n{lines}") from error


def for_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """The same config in the form that transformers' classes accept: "not used" (null, false or 0) written as the class
    writes it, the head width under its usual name, and no labels of a classifier."""
    family: Family = config["model_type"]
    fixed = {key: value for key, value in _FIXED[family].items() if key in config and not config[key] and not value}
    if config.get("time_step_min", 1) is None:
        fixed["time_step_min"] = NO_CLAMP
    if config.get("head_dim") is None and config.get("attention_head_dim") is not None:
        fixed["head_dim"] = config["attention_head_dim"]
    return {key: value for key, value in (config | fixed).items() if key not in _LABELS}


def clamp_of(config: dict[str, Any]) -> float:
    """The lower bound on dt that transformers applies for this config; 0 without one, or if it is negligible."""
    if config.get("model_type") != "nemotron_h":
        return 0.0
    floor = config.get("time_step_min", 1e-3)
    return float(floor) if isinstance(floor, int | float) and floor > 1e-9 else 0.0


def is_reward_model(config: dict[str, Any]) -> bool:
    """Whether a config is of a reward model."""
    return _head_of(config, []) == "scalar"


def _mtp_of(config: dict[str, Any], problems: list[str]) -> MtpConfig:
    """Further depths of a config."""
    depths = config.get("num_nextn_predict_layers") or 0
    if not isinstance(depths, int) or not 0 <= depths <= 16:
        problems.append(f"num_nextn_predict_layers={depths!r} is not a whole number up to 16")
        return MtpConfig()
    if not depths:
        return MtpConfig()
    pattern = config.get("mtp_hybrid_override_pattern")
    if pattern is None:
        pattern = _nemotron_pattern({"layers_block_type": config.get("mtp_layers_block_type", [])}, problems)
    if not isinstance(pattern, str) or not pattern or set(pattern) - set(_LAYERS):
        problems.append(
            f"mtp_hybrid_override_pattern={pattern!r}: the layers of a depth are letters of {', '.join(_LAYERS)}"
        )
        return MtpConfig()
    return MtpConfig(depths=depths, pattern=pattern)


def _head_of(config: dict[str, Any], problems: list[str]) -> str:
    """What the model computes, by the class that the config names."""
    classes = config.get("architectures")
    names = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return "vocabulary"
    if _SCORED not in names:
        problems.append(f"architectures={classes!r}: the only classifier that is supported is {_SCORED}")
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # 2: the default of transformers
    if count != 1:
        problems.append(f"{_SCORED} with {count!r} labels: only 1 is supported, the reward")
    return "scalar"


def _not_nemotron(model: ModelConfig) -> list[str]:
    wanted = {
        "position": "none", "attention_softcap": None, "logit_softcap": None, "norm_offset": 0, "post_norms": False,
        "scale_embedding": False, "head": "vocabulary", "qk_norm": False,
    }  # fmt: skip
    problems = [f"model.{key}={getattr(model, key)}" for key, value in wanted.items() if getattr(model, key) != value]
    if "w" in kinds_of(model):
        problems.append("attention over a window (`w`) in model.pattern or model.mtp.pattern")
    if model.activation not in _ACTIVATIONS:
        problems.append(f"model.activation={model.activation}")
    if model.query_scale not in (None, model.head_dim):
        problems.append(f"model.query_scale={model.query_scale}")
    return problems + (_not_their_experts(model.experts) if "E" in kinds_of(model) else [])


def _not_their_experts(experts: ExpertsConfig) -> list[str]:
    """What NemotronHMoE of transformers does not have. It scores a group by its two best experts."""
    key, problems = "model.experts", []
    if experts.score != "sigmoid":
        problems.append(f"{key}.score={experts.score}")
    if experts.bias_rate == 0:
        problems.append(f"{key}.bias_rate=0: the class has a bias")
    if experts.shared_ffn == 0:
        problems.append(f"{key}.shared_ffn=0: the class has a shared expert")
    if experts.capacity is not None:
        problems.append(f"{key}.capacity={experts.capacity:g}")
    if experts.groups > 1 and experts.top_k != 2 * experts.top_groups:
        problems.append(
            f"{key}.top_k={experts.top_k} from top_groups={experts.top_groups}: the class takes two of each"
        )
    return problems


def _not_gemma(model: ModelConfig) -> list[str]:
    wanted = {
        "position": "rope", "activation": "geglu", "norm_offset": 1, "post_norms": True, "scale_embedding": True,
        "qk_norm": False,
    }  # fmt: skip
    wanted |= {"tie_embeddings": True} if model.head == "vocabulary" else {}
    problems = [f"model.{key}={getattr(model, key)}" for key, value in wanted.items() if getattr(model, key) != value]
    if model.mtp.depths:
        problems.append(f"model.mtp.depths={model.mtp.depths}")
    kinds = layer_kinds(model.pattern)
    if len(kinds) % 2 or set(kinds[::2]) - {"w", "*"} or set(kinds[1::2]) != {"-"}:
        problems.append("model.pattern is not attention and MLP in turn")
    if model.query_scale is not None and model.query_scale != int(model.query_scale):
        problems.append(f"model.query_scale={model.query_scale} is not a whole number")
    if model.hidden % model.heads:
        problems.append(f"model.heads={model.heads} does not divide model.hidden={model.hidden}")
    return problems


def _check_bounds(config: dict[str, Any], problems: list[str]) -> None:
    """Our dt has no bounds: refuse `time_step_limit`. `clamp_of` handles the lower bound `time_step_min`."""
    floor = config.get("time_step_min")
    if floor is not None and not (isinstance(floor, int | float) and 0 <= floor <= 1):
        problems.append(f"time_step_min={floor!r} is not a number from 0 to 1")
    limit = config.get("time_step_limit")
    if limit is None:
        return
    try:
        # transformers writes infinity as an object.
        bounds = (bound["__float__"] if isinstance(bound, dict) else bound for bound in limit)
        low, high = (bound if bound is None else float(bound) for bound in bounds)
    except (TypeError, ValueError, KeyError, OverflowError):
        problems.append(f"time_step_limit={limit!r} is not a pair of numbers")
        return
    if (low or 0.0) > 0 or (high is not None and high != math.inf):
        problems.append(f"time_step_limit={limit!r}: dt has no bounds here; only [0.0, Infinity] is supported")


def _nemotron_pattern(config: dict[str, Any], problems: list[str]) -> str | None:
    pattern, kinds = config.get("hybrid_override_pattern"), config.get("layers_block_type")
    if any(isinstance(given, str | list) and len(given) > _MOST_LAYERS for given in (pattern, kinds)):
        problems.append(f"the pattern has more than {_MOST_LAYERS:,} layers")
        return None
    if kinds is not None:
        if not isinstance(kinds, list):
            problems.append(f"layers_block_type={kinds!r} is not a list of kinds of layers")
            return None
        signs = {name: sign for sign, name in _LAYERS.items()} | _OLD_LAYERS
        spelled = "".join(signs.get(name, "?") if isinstance(name, str) else "?" for name in kinds)
        if pattern is not None and pattern != spelled:
            problems.append(f"hybrid_override_pattern={pattern} and layers_block_type ({spelled}) disagree")
        pattern = spelled
    if pattern is None:
        problems.append("hybrid_override_pattern (or layers_block_type) is missing")
        return None
    if not isinstance(pattern, str):
        problems.append(f"hybrid_override_pattern={pattern!r} is not a string")
        return None
    if config.get("num_hidden_layers", len(pattern)) != len(pattern):
        problems.append(f"num_hidden_layers={config['num_hidden_layers']!r}, but the pattern has {len(pattern)} layers")
    if strange := sorted(set(pattern) - set("M*-E")):
        problems.append(f"hybrid_override_pattern={pattern}: no layers of kind {', '.join(strange)} here")
    return pattern


def _experts_of(config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Fields of `model.experts`. Balancing is not in a config: the default, which has the bias that the class has."""
    found = {}
    for theirs, ours in _EXPERTS.items():
        value = config.get(theirs)
        if value is None:
            problems.append(f"{theirs} is missing")
        elif isinstance(value, int) and value > _LARGEST_SIZE:
            problems.append(f"{theirs}={value}: the largest size that is read is {_LARGEST_SIZE:,}")
        found[ours] = value
    found["latent"] = config.get("moe_latent_size") or 0
    is_normalised = bool(config.get("norm_topk_prob", True))
    top_k = found["top_k"]
    if isinstance(top_k, int) and is_normalised != (top_k > 1):
        problems.append(
            f"norm_topk_prob={is_normalised} with num_experts_per_tok={top_k}: the weights of the chosen experts are divided by "
            f"their sum here exactly if there are several"
        )
    return found


def _rope(model: ModelConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_theta": model.rope_base, "rope_type": "default"}
    if model.rope_scaling != "none":
        parameters |= {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = model.rope_original_tokens
    if model.rope_scaling == "llama3":
        parameters |= _LLAMA3
    return parameters


def _gemma_fields(config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    rope: dict[str, Any] = {}
    for place in ("rope_scaling", "rope_parameters"):
        entry = config.get(place) or {}
        if not isinstance(entry, dict):
            problems.append(f"{place}={entry!r} is not an object of fields")
            continue
        entry = dict(entry)
        old_kind = entry.pop("type", None)  # an older spelling
        if old_kind is not None and entry.setdefault("rope_type", old_kind) != old_kind:
            problems.append(f"{place}: rope_type={entry['rope_type']!r} and type={old_kind!r} disagree")
        for key, value in entry.items():
            if rope.setdefault(key, value) != value:
                problems.append(f"rope_scaling and rope_parameters disagree: {key} is {rope[key]!r} and {value!r}")
    if (base := config.get("rope_theta")) is not None and rope.setdefault("rope_theta", base) != base:
        problems.append(f"rope_theta={base!r} and rope_parameters (rope_theta={rope['rope_theta']!r}) disagree")
    kind, base = rope.pop("rope_type", "default"), rope.pop("rope_theta", 10000.0)
    fields: dict[str, Any] = {
        "activation": "geglu",
        "position": "rope",
        "rope_base": base,
        "norm_offset": 1,
        "post_norms": True,
        "scale_embedding": True,
        "tie_embeddings": True,
    }
    if kind in ("linear", "yarn", "llama3"):
        factor = rope.pop("factor", 1.0)
        if not isinstance(factor, int | float) or not 0 < factor < _LARGEST_SIZE:
            problems.append(f"the rope factor {factor!r} is not a positive number below {_LARGEST_SIZE:,}")
            factor = 1.0
        fields |= {"rope_scaling": kind, "rope_factor": float(factor)}
        # If missing, it is the model's maximum length, as in transformers.
        whole = config.get("max_position_embeddings", 8192)
        fields["rope_original_tokens"] = rope.pop("original_max_position_embeddings", None) or whole
    elif kind != "default":
        problems.append(f"rope_type={kind!r}: supported are default, linear, yarn, llama3")
    if kind == "llama3":
        rope = {key: value for key, value in rope.items() if (key, value) not in _LLAMA3.items()}
    if rope:
        problems.append(f"rope_parameters: {', '.join(sorted(rope))} not supported here")
    count = config.get("num_hidden_layers")
    kinds = config.get("layer_types")
    sizes = (count, len(kinds) if isinstance(kinds, list) else 0)
    if any(isinstance(size, int) and size > _MOST_LAYERS for size in sizes):
        problems.append(f"num_hidden_layers or layer_types: the most layers that are read are {_MOST_LAYERS:,}")
        return fields
    if kinds is None and isinstance(count, int):
        kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(count)]
    if kinds is None:
        problems.append(
            "num_hidden_layers is missing" if count is None else f"num_hidden_layers={count!r} is not a number"
        )
        return fields
    if not isinstance(kinds, list) or not all(isinstance(name, str) for name in kinds):
        problems.append(f"layer_types={kinds!r} is not a list of kinds of attention")
        return fields
    if count is not None and count != len(kinds):
        problems.append(f"num_hidden_layers={count!r}, but layer_types names {len(kinds)}")
    signs = {"sliding_attention": "w", "full_attention": "*"}
    if strange := sorted(set(kinds) - signs.keys()):
        problems.append(f"layer_types: {', '.join(strange)} not supported")
    fields["pattern"] = "".join(f"{signs.get(name, '?')}-" for name in kinds)
    return fields

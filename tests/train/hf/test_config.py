"""config.json: each field as in the published ones, read back by transformers and by us; unknown models are refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from hf_models import FAMILIES, GEMMA, HYBRID, TOKENS
from transformers import AutoConfig

from recipes.schema.command import RECIPES
from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.mtp import MtpConfig
from recipes.schema.typed import build
from train.hf.config import SpecialTokens, clamp_of, family_of, for_transformers, from_config, read_config, to_config

# config.json of nvidia/NVIDIA-Nemotron-Nano-9B-v2 (revision 6533e8de).
NANO_9B = {
    "hidden_size": 4480, "num_hidden_layers": 56, "intermediate_size": 15680, "num_attention_heads": 40,
    "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80, "n_groups": 8,
    "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128, "expand": 2, "vocab_size": 131072,
    "tie_word_embeddings": False, "use_bias": False, "use_conv_bias": True, "attention_bias": False,
    "mlp_hidden_act": "relu2", "layer_norm_epsilon": 1e-5, "residual_in_fp32": False, "sliding_window": None,
    "max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 12,
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
}  # fmt: skip
# google/gemma-2-27b; the others differ in sizes only (github.com/google/gemma_pytorch, gemma/config.py).
GEMMA_27B = {
    "hidden_size": 4608, "num_hidden_layers": 46, "intermediate_size": 36864, "num_attention_heads": 32,
    "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144, "sliding_window": 4096,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 8192, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    "vocab_size": 256000, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "attention_bias": False,
}  # fmt: skip
GEMMA_9B = GEMMA_27B | {
    "hidden_size": 3584, "num_hidden_layers": 42, "intermediate_size": 14336, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256,
}  # fmt: skip
GEMMA_2B = GEMMA_9B | {
    "hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
PUBLISHED = {
    "nemotron_nano_9b_v2": NANO_9B,
    "gemma2_2b": GEMMA_2B,
    "gemma2_9b": GEMMA_9B,
    "gemma2_27b": GEMMA_27B,
}


def recipe_model(name: str) -> ModelConfig:
    return build(ModelConfig, yaml.safe_load((RECIPES / "model" / f"{name}.yaml").read_text()), "model")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_is_what_the_published_config_says(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    tokens = SpecialTokens(published["bos_token_id"], published["eos_token_id"], published["pad_token_id"])  # type: ignore[arg-type]
    positions = published["max_position_embeddings"]
    config = to_config(recipe_model(name), tokens=tokens, max_positions=positions, dtype="bfloat16")  # type: ignore[arg-type]
    assert {key: config[key] for key in published} == published
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert {key: getattr(theirs, key) for key in published if key != "rope_theta"} == {
        key: value for key, value in published.items() if key != "rope_theta"
    }
    assert type(theirs).__name__ == config["architectures"][0].replace("ForCausalLM", "Config")
    assert theirs.dtype == torch.bfloat16


SHIPPED = [
    path.stem for path in sorted((RECIPES / "model").glob("*.yaml")) if path.stem.startswith(("nemotron", "gemma2"))
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_come_back_as_they_were(name: str) -> None:
    model = recipe_model(name)
    model = replace(model, experts=replace(model.experts, aux_loss="none"))  # a config says nothing about training
    assert from_config(to_config(model, tokens=TOKENS, max_positions=64, dtype="float32"), where="x") == model


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    for model in (HYBRID, GEMMA, replace(GEMMA, rope_scaling="yarn", rope_factor=4.0, query_scale=None)):
        folder = tmp_path / model.pattern
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(
            json.dumps(to_config(model, tokens=TOKENS, max_positions=64, dtype="float32"))
        )
        AutoConfig.from_pretrained(folder).save_pretrained(folder)  # layers_block_type, rope_parameters, ...
        again = from_config(json.loads((folder / "config.json").read_text()), where="x")
        unread = {"gemma2": [name for name in asdict(model) if name.startswith("mamba_")], "nemotron_h": []}
        free = {name: getattr(model, name) for name in unread[family_of(model)]}
        assert replace(again, **free) == model


def test_nothing_is_read_without_being_understood() -> None:
    config = to_config(HYBRID, tokens=TOKENS, max_positions=64, dtype="float32")
    bad = config | {
        "hybrid_override_pattern": "MG*-", "mlp_hidden_act": "gelu", "use_bias": True, "sliding_window": 512,
        "num_nextn_predict_layers": 99,
    }  # fmt: skip
    del bad["n_groups"]
    with pytest.raises(RecipeError) as caught:
        from_config(bad, where="config.json")
    for part in ("no layers of kind G", "mlp_hidden_act='gelu'", "use_bias=True", "sliding_window=512", "n_groups is missing",
                 "num_nextn_predict_layers=99"):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(RecipeError, match=r"model_type='llama' is not supported"):
        from_config({"model_type": "llama"}, where="config.json")
    gemma = to_config(GEMMA, tokens=TOKENS, max_positions=64, dtype="float32")
    for change, message in (
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ({"layer_types": ["sliding_attention", "chunked_attention"]}, "chunked_attention not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast not supported"),
        ({"hidden_size": "wide"}, "model.hidden='wide'"),
        ({"num_hidden_layers": 5}, "num_hidden_layers=5, but layer_types names 3"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention' is not a list"),
        ({"rope_parameters": "default"}, "rope_parameters='default' is not an object"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings='long' is not a positive whole number"),
    ):
        with pytest.raises(RecipeError, match=message):
            from_config(gemma | change, where="config.json")
    for change, message in (
        ({"num_hidden_layers": 3}, f"num_hidden_layers=3, but the pattern has {len(HYBRID.pattern)} layers"),
        ({"layers_block_type": ["mamba", "mlp"]}, r"hybrid_override_pattern=.* and layers_block_type \(M-\) disagree"),
        ({"layers_block_type": "mamba"}, "layers_block_type='mamba' is not a list"),
        ({"hybrid_override_pattern": 5}, "hybrid_override_pattern=5 is not a string"),
    ):
        with pytest.raises(RecipeError, match=message):
            from_config(config | change, where="config.json")


def test_yarn_without_its_original_length_takes_the_models_length_as_transformers_does(tmp_path: Path) -> None:
    model = replace(GEMMA, rope_scaling="yarn", rope_factor=4.0, rope_original_tokens=64)
    config = to_config(model, tokens=TOKENS, max_positions=64, dtype="float32")
    del config["rope_parameters"]["original_max_position_embeddings"]
    assert from_config(config, where="x").rope_original_tokens == 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["original_max_position_embeddings"] == 64


def test_harmless_spellings_are_read_and_contradictions_are_not() -> None:
    gemma = to_config(GEMMA, tokens=TOKENS, max_positions=64, dtype="float32")
    hybrid = to_config(HYBRID, tokens=TOKENS, max_positions=64, dtype="float32")
    harmless = {"use_bidirectional_attention": False, "attention_dropout": None}
    assert from_config(gemma | harmless, where="x") == from_config(gemma, where="x")
    null = hybrid | {"time_step_min": None, "time_step_limit": [0.0, float("inf")], "attention_dropout": None}
    assert from_config(null, where="x") == from_config(hybrid, where="x") and clamp_of(null) == 0.0
    narrow = {key: value for key, value in hybrid.items() if key != "head_dim"} | {
        "attention_head_dim": HYBRID.head_dim
    }
    assert from_config(narrow, where="x") == from_config(hybrid, where="x")
    assert AutoConfig.for_model(**for_transformers(narrow | {"time_step_min": None})).head_dim == HYBRID.head_dim
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    for config, message in (
        (gemma | {"rope_theta": 5.0, "rope_parameters": rope}, "rope_theta=5.0 and rope_parameters"),
        (gemma | {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": rope}, "disagree: rope_type is 'linear'"),
        (gemma | {"rope_parameters": rope | {"type": "yarn"}}, "rope_type='default' and type='yarn' disagree"),
        (hybrid | {"time_step_limit": [0.0, 0.5]}, r"time_step_limit=\[0.0, 0.5\]: dt has no bounds here"),
        (hybrid | {"time_step_min": "small"}, "time_step_min='small' is not a number"),
    ):
        with pytest.raises(RecipeError, match=message):
            from_config(config, where="x")


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(RecipeError, match="is not an object of fields but list"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"position": "rope"}, "model.position=rope"),
        ({"activation": "swiglu"}, "model.activation=swiglu"),
        ({"pattern": "M-w-"}, "attention over a window"),
        ({"logit_softcap": 30.0}, "model.logit_softcap=30.0"),
    ],
)
def test_a_model_that_no_class_computes_is_refused_by_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        family_of(replace(HYBRID, **change))
    assert field in str(caught.value) and "Gemma2ForCausalLM" in str(caught.value)


def test_exported_configs_clamp_nothing() -> None:
    for model in FAMILIES.values():
        config = to_config(model, tokens=TOKENS, max_positions=64, dtype="float32")
        assert clamp_of(config) == 0.0
    published = to_config(HYBRID, tokens=TOKENS, max_positions=64, dtype="float32") | {"time_step_min": 0.001}
    assert clamp_of(published) == 0.001


def test_further_depths_come_back_from_a_config() -> None:
    model = replace(HYBRID, mtp=MtpConfig(depths=2, pattern="*-"))
    config = to_config(model, tokens=TOKENS, max_positions=64, dtype="float32")
    assert (config["num_nextn_predict_layers"], config["mtp_hybrid_override_pattern"]) == (2, "*-")
    assert from_config(config, where="x") == model
    kinds = {**config, "mtp_layers_block_type": ["attention", "mlp"]}
    del kinds["mtp_hybrid_override_pattern"]
    assert from_config(kinds, where="x") == model
    with pytest.raises(RecipeError, match="num_nextn_predict_layers=-1"):
        from_config({**config, "num_nextn_predict_layers": -1}, where="x")

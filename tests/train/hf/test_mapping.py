"""The table gives the exact parameter counts of published models, and both kinds of moves are exact inverses."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from hf_models import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.schema.command import RECIPES
from recipes.schema.errors import RecipeError
from recipes.schema.experts import ExpertsConfig
from recipes.schema.model import ModelConfig
from recipes.schema.mtp import MtpConfig
from recipes.schema.typed import build
from train.hf.config import family_of
from train.hf.mapping import Pair, pairs, to_ours, to_theirs

# Public totals (safetensors of 9B-v2 and Gemma 2; model cards and reports of the others): tests/train/model/test_pattern.py.
PUBLISHED = {
    "nemotron_h_8b": 8_100_852_736,
    "nemotron_nano_9b_v2": 8_888_227_328,
    "nemotron_nano_12b_v2": 12_310_001_152,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_sides_hold_every_published_parameter_once(name: str) -> None:
    model = build(ModelConfig, yaml.safe_load((RECIPES / "model" / f"{name}.yaml").read_text()), "model")
    found = pairs(model, family_of(model))
    for side in ("ours", "theirs"):
        names = [tensor for pair in found for tensor in getattr(pair, side)]
        assert len(names) == len(set(names))
        assert sum(math.prod(shape) for pair in found for shape in getattr(pair, side).values()) == PUBLISHED[name]


def numbered(pair: Pair, side: str) -> list[torch.Tensor]:
    """Tensors of one side of a pair with every number different."""
    shapes = list(getattr(pair, side).values())
    whole = torch.arange(sum(math.prod(shape) for shape in shapes), dtype=torch.float64)
    return [
        part.reshape(shape)
        for part, shape in zip(whole.split([math.prod(shape) for shape in shapes]), shapes, strict=True)
    ]


@settings(max_examples=30)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    hidden=st.integers(1, 7),
    mamba=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    padding=st.integers(0, 3),
)
def test_there_and_back_is_the_same(
    family: str, groups: int, per_group: int, head_dim: int, hidden: int, mamba: tuple[int, int, int], padding: int
) -> None:
    model = replace(
        FAMILIES[family],
        heads=groups * per_group,
        kv_heads=groups,
        head_dim=head_dim,
        hidden=hidden,
        vocab=11 + padding,
        mamba_groups=mamba[0],
        mamba_heads=2 * mamba[0],
        mamba_head_dim=mamba[1],
        mamba_state=mamba[2],
    )
    for pair in pairs(model, family, vocab=11):  # type: ignore[arg-type]
        theirs = numbered(pair, "theirs")
        ours = to_ours(pair, theirs)
        assert [tuple(tensor.shape) for tensor in ours] == list(pair.ours.values())
        back = to_theirs(pair, ours)
        assert all(torch.equal(a, b) for a, b in zip(theirs, back, strict=True)), pair
        if not (pair.pads and padding):
            again = to_ours(pair, to_theirs(pair, numbered(pair, "ours")))
            assert all(torch.equal(a, b) for a, b in zip(numbered(pair, "ours"), again, strict=True)), pair


def test_queries_of_a_group_lie_before_its_key_and_value() -> None:
    model = replace(FAMILIES["gemma2"], heads=4, kv_heads=2, head_dim=1, hidden=1)
    pair = next(pair for pair in pairs(model, "gemma2") if pair.move == "groups")
    query, key, value = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[10.0], [20]]), torch.tensor([[30.0], [40]])
    (fused,) = to_ours(pair, [query, key, value])
    assert fused.flatten().tolist() == [1, 2, 10, 30, 3, 4, 20, 40]


def test_padding_of_the_vocabulary_is_never_the_most_likely() -> None:
    model = replace(FAMILIES["nemotron_h"], vocab=40)
    pair = next(pair for pair in pairs(model, "nemotron_h", vocab=37) if "output_layer.weight" in pair.ours)
    head = torch.randn(37, model.hidden)
    (padded,) = to_ours(pair, [head])
    logits = torch.randn(100, model.hidden) @ padded.T
    assert torch.equal(padded[:37], head) and (logits[:, 37:] < logits.max(dim=1, keepdim=True).values).all()


def test_a_larger_vocabulary_than_ours_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"model\.vocab=256 is smaller than the vocabulary of 300"):
        pairs(FAMILIES["gemma2"], "gemma2", vocab=300)


def test_further_depths_have_the_names_of_nemotron_3_supers_files() -> None:
    """Names as vLLM, TensorRT-LLM and others read them from nvidia/NVIDIA-Nemotron-3-Super-120B-A12B (pattern `*E`, one set)."""
    experts = ExpertsConfig(count=2, top_k=1, ffn=4, shared_ffn=4, latent=3)
    model = replace(
        FAMILIES["nemotron_h"], pattern="M", experts=experts, mtp=MtpConfig(depths=2, pattern="*E", repeated=True)
    )
    found = {name for pair in pairs(model, "nemotron_h") for name in pair.theirs if name.startswith("mtp.")}
    mixer = "mtp.layers.1.mixer."
    assert found == {
        *(f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "norm")),
        *(f"mtp.layers.0.mixer.{name}_proj.weight" for name in "qkvo"),
        "mtp.layers.1.norm.weight", "mtp.layers.1.final_layernorm.weight",
        f"{mixer}gate.weight", f"{mixer}gate.e_score_correction_bias",
        f"{mixer}fc1_latent_proj.weight", f"{mixer}fc2_latent_proj.weight",
        *(f"{mixer}{part}.{way}_proj.weight" for part in ("experts.0", "experts.1", "shared_experts") for way in ("up", "down")),
    }  # fmt: skip

"""Pruned weights of a transformers model against slices of its weights by hand, in numpy.

    transformers' model --import--> parent --cut--> small --export--> a model of transformers | its own weights, indexed by hand

Everything here is written in transformers' layout (arXiv 2504.11409, section 3 for Mamba): a group's queries in `q_proj`
share keys and values, `in_proj` holds z, x, B, C, dt below each other, `conv1d` holds x, B, C.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import GEMMA, HYBRID, TOKENS
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.schema.model import ModelConfig
from train.checkpoint.manifest import RunState
from train.checkpoint.storage import publish
from train.checkpoint.tensors import StoredTensors
from train.compress.prune import Target, choose, cut_weights, pruned_model
from train.compress.scores import Scores
from train.hf.config import to_config
from train.hf.convert import export_weights, import_weights
from train.hf.files import WeightFiles

TARGETS = {
    "nemotron_h": (HYBRID, Target(layers=6, hidden=40, ffn=72, heads=3, mamba_heads=4, mamba_head_dim=8)),
    "gemma2": (GEMMA, Target(hidden=36, ffn=56, heads=3)),
}
LAYERS = {"nemotron_h": [0, 1, 2, 3, 6, 7], "gemma2": [0, 1, 2, 3, 4, 5]}
"""What the scores below say should stay, of `M-M*-M*-`: not layers 4 (-) and 5 (M)."""
NORMS = {"M": "norm", "-": "pre_mlp_layernorm"}
"""What our norms in front of layers are called; others: `input_layernorm`."""


def test_pruned_weights_are_transformers_weights_indexed_by_hand(
    family: str, tmp_path: Path, theirs: dict[str, np.ndarray]
) -> None:
    model, target = TARGETS[family]
    stored = _imported(tmp_path / "hf", tmp_path / "parent", model)
    scores = _scores(model)
    kept = choose(scores, target)
    assert kept.layers == LAYERS[family]
    small = pruned_model(model, target, kept.layers)
    aside = tmp_path / ".small.writing"
    aside.mkdir()
    cut_weights(stored.folder, aside, scores=scores, kept=kept, small=small)
    (tmp_path / "out").mkdir()
    export_weights(_published(tmp_path / "small"), tmp_path / "out", model=small)
    (tmp_path / "out" / "config.json").write_text(json.dumps(_config(small)))
    ours = _weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))

    by_hand = (_nemotron if family == "nemotron_h" else _gemma)(theirs, model, target, scores)
    assert set(ours) == set(by_hand)
    for name, expected in by_hand.items():
        assert ours[name].shape == expected.shape, name
        np.testing.assert_allclose(ours[name], expected, rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.fixture(params=TARGETS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def theirs(family: str, tmp_path: Path) -> dict[str, np.ndarray]:
    """Weights of a model that transformers drew, saved in tmp_path/hf: all different, so that no wrong row looks right."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(_config(TARGETS[family][0])))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    return _weights(model)


def _nemotron(w: dict[str, np.ndarray], model: ModelConfig, target: Target, scores: Scores) -> dict[str, np.ndarray]:
    h = _top(scores.hidden, target.hidden)
    out = {
        "model.embeddings.weight": w["model.embeddings.weight"][:, h],
        "model.norm_f.weight": w["model.norm_f.weight"][h] * _mean_ratio(scores.energy["decoder.final_norm"], h),
        "lm_head.weight": w["lm_head.weight"][:, h],
    }
    inner, states = model.mamba_heads * model.mamba_head_dim, model.mamba_groups * model.mamba_state
    for place, number in enumerate(LAYERS["nemotron_h"]):
        old, new = f"model.layers.{number}.", f"model.layers.{place}."
        kind = model.pattern[number]
        energy = scores.energy[f"decoder.layers.{number}.{NORMS.get(kind, 'input_layernorm')}"]
        out[f"{new}norm.weight"] = w[f"{old}norm.weight"][h] * _mean_ratio(energy, h)
        if kind == "-":
            f = _top(scores.layers[number]["ffn"], target.ffn)
            out[f"{new}mixer.up_proj.weight"] = w[f"{old}mixer.up_proj.weight"][f][:, h]
            out[f"{new}mixer.down_proj.weight"] = w[f"{old}mixer.down_proj.weight"][h][:, f]
        elif kind == "*":
            out |= _attention(w, f"{old}mixer.", f"{new}mixer.", model, target, scores.layers[number]["heads"], h)
        else:
            heads, channels = _mamba(scores.layers[number]["mamba"], model, target)
            d = np.concatenate([head * model.mamba_head_dim + channels for head in heads])
            whole = w[f"{old}mixer.in_proj.weight"]
            z, x, b, c, dt = np.split(whole, np.cumsum([inner, inner, states, states]))
            out[f"{new}mixer.in_proj.weight"] = np.concatenate([z[d], x[d], b, c, dt[heads]])[:, h]
            for part in ("weight", "bias"):
                x, b, c = np.split(w[f"{old}mixer.conv1d.{part}"], np.cumsum([inner, states]))
                out[f"{new}mixer.conv1d.{part}"] = np.concatenate([x[d], b, c])
            for part in ("A_log", "D", "dt_bias"):
                out[f"{new}mixer.{part}"] = w[f"{old}mixer.{part}"][heads]
            by_group = scores.energy[f"decoder.layers.{number}.mixer.norm"].reshape(model.mamba_groups, -1)
            kept = (
                d.reshape(model.mamba_groups, -1) - inner // model.mamba_groups * np.arange(model.mamba_groups)[:, None]
            )
            ratio = [np.sqrt(group[mine].mean() / group.mean()) for group, mine in zip(by_group, kept, strict=True)]
            out[f"{new}mixer.norm.weight"] = w[f"{old}mixer.norm.weight"][d] * np.repeat(ratio, kept.shape[1])
            out[f"{new}mixer.out_proj.weight"] = w[f"{old}mixer.out_proj.weight"][h][:, d]
    return out


def _gemma(w: dict[str, np.ndarray], model: ModelConfig, target: Target, scores: Scores) -> dict[str, np.ndarray]:
    """Gemma multiplies embeddings by the root of its width, and norms by 1 + weight; the head is the embedding."""
    h = _top(scores.hidden, target.hidden)
    grown = np.sqrt(model.hidden / target.hidden)

    def norm(theirs: str, site: str, shrunk: float = 1.0) -> np.ndarray:
        return (1 + w[theirs][h]) * _mean_ratio(scores.energy[site], h) / shrunk - 1

    out = {
        "model.embed_tokens.weight": w["model.embed_tokens.weight"][:, h] * grown,
        "model.norm.weight": norm("model.norm.weight", "decoder.final_norm", grown),
    }
    for block in range(len(model.pattern) // 2):
        at, first, second = f"model.layers.{block}.", f"decoder.layers.{2 * block}.", f"decoder.layers.{2 * block + 1}."
        for name, site in (
            ("input_layernorm", f"{first}input_layernorm"),
            ("post_attention_layernorm", f"{first}post_norm"),
            ("pre_feedforward_layernorm", f"{second}pre_mlp_layernorm"),
            ("post_feedforward_layernorm", f"{second}post_norm"),
        ):
            out[f"{at}{name}.weight"] = norm(f"{at}{name}.weight", site)
        heads = scores.layers[2 * block]["heads"]
        out |= _attention(w, f"{at}self_attn.", f"{at}self_attn.", model, target, heads, h)
        f = _top(scores.layers[2 * block + 1]["ffn"], target.ffn)
        for branch in ("gate_proj", "up_proj"):
            out[f"{at}mlp.{branch}.weight"] = w[f"{at}mlp.{branch}.weight"][f][:, h]
        out[f"{at}mlp.down_proj.weight"] = w[f"{at}mlp.down_proj.weight"][h][:, f]
    return out


def _attention(
    w: dict[str, np.ndarray],
    old: str,
    new: str,
    model: ModelConfig,
    target: Target,
    scores: np.ndarray,
    h: np.ndarray,
) -> dict[str, np.ndarray]:
    """The best query heads of each key/value head, whose keys and values all stay."""
    per_group, keep = model.heads // model.kv_heads, target.heads // model.kv_heads
    heads = np.concatenate(
        [g * per_group + _top(scores[g * per_group :][:per_group], keep) for g in range(model.kv_heads)]
    )
    q = np.concatenate([np.arange(head * model.head_dim, (head + 1) * model.head_dim) for head in heads])
    return {
        f"{new}q_proj.weight": w[f"{old}q_proj.weight"][q][:, h],
        f"{new}k_proj.weight": w[f"{old}k_proj.weight"][:, h],
        f"{new}v_proj.weight": w[f"{old}v_proj.weight"][:, h],
        f"{new}o_proj.weight": w[f"{old}o_proj.weight"][h][:, q],
    }


def _mamba(scores: np.ndarray, model: ModelConfig, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """(heads, channels): the channels that are strongest over all heads; of each group the heads strongest in those."""
    channels = _top(np.sqrt((scores**2).sum(0)), target.mamba_head_dim)
    strength = np.sqrt((scores[:, channels] ** 2).sum(1))
    size, keep = model.mamba_heads // model.mamba_groups, target.mamba_heads // model.mamba_groups
    groups = range(model.mamba_groups)
    return np.concatenate([g * size + _top(strength[g * size :][:size], keep) for g in groups]), channels


def _top(scores: np.ndarray, keep: int) -> np.ndarray:
    return np.array(sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:keep]))


def _mean_ratio(energy: np.ndarray, kept: np.ndarray) -> float:
    return float(np.sqrt(energy[kept].mean() / energy.mean()))


def _scores(model: ModelConfig) -> Scores:
    """Random scores, so that the choice differs in each layer."""
    rng = np.random.default_rng(5)
    scores = Scores(model=asdict(model), parent="", rows=1)
    scores.hidden = rng.random(model.hidden)
    inner = model.mamba_heads * model.mamba_head_dim
    sites = {"decoder.final_norm": model.hidden}
    for number, kind in enumerate(model.pattern):
        place = f"decoder.layers.{number}"
        sites[f"{place}.{NORMS.get(kind, 'input_layernorm')}"] = model.hidden
        if kind == "M":
            sites[f"{place}.mixer.norm"] = inner
            scores.layers[number] = {"mamba": rng.random((model.mamba_heads, model.mamba_head_dim))}
        elif kind == "-":
            scores.layers[number] = {"ffn": rng.random(model.ffn)}
        else:
            scores.layers[number] = {"heads": rng.random(model.heads)}
        if model.post_norms:
            sites[f"{place}.post_norm"] = model.hidden
    scores.energy = {site: 0.1 + rng.random(size) for site, size in sites.items()}
    scores.influence = np.ones(len(model.pattern))
    scores.influence[4:6] = 0.5
    return scores


def _config(model: ModelConfig) -> dict[str, object]:
    return dict(to_config(model, tokens=TOKENS, max_positions=64, dtype="float32"))


def _weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """By name, float64. A tied head counts once."""
    return {name: tensor.detach().double().numpy() for name, tensor in model.named_parameters()}


def _imported(directory: Path, folder: Path, model: ModelConfig) -> StoredTensors:
    aside = folder.with_name(f".{folder.name}.writing")
    aside.mkdir()
    import_weights(WeightFiles(directory), aside, model=model)
    return _published(folder)


def _published(folder: Path) -> StoredTensors:
    publish(folder.with_name(f".{folder.name}.writing"), folder, RunState())
    return StoredTensors(folder)

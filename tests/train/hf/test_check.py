"""The comparison finds faults of conversion: the logits alone refuse each, and the first wrong block is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, GEMMA, HYBRID, exported, ids_of, recipe_of, scrambled, trained
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import engine_of

from recipes.schema.experts import ExpertsConfig
from recipes.schema.model import ModelConfig
from recipes.schema.mtp import MtpConfig
from train.checkpoint.storage import read_weights
from train.checkpoint.tensors import StoredTensors
from train.hf.check import compare, load_theirs
from train.hf.convert import different_weights
from train.hf.files import WeightFiles
from train.hf.mapping import pairs, to_theirs

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Found:
    """The result of a comparison, small enough to pickle."""

    problems: list[str]
    first: str
    drifting: list[str]
    logits: float
    generated: tuple[int, int]
    rows: int


def found_in(
    rank: int, checkpoint: Path, model: ModelConfig, folders: dict[str, Path], clamped: bool
) -> dict[str, Found]:
    """Compare one checkpoint with several directories."""
    results = {}
    with engine_of(recipe_of(model), rank=rank, world=1) as engine:
        ours = engine.chunks[0].module.eval()
        read_weights(checkpoint, [ours], groups=engine.mesh.groups)
        ids = ids_of(2, 51, model.vocab)
        for name, folder in folders.items():
            theirs = load_theirs(folder, dtype=torch.float32, device=torch.device("cpu"), open_clamp=not clamped)
            agreement = compare(ours, theirs, ids, model=model)
            first = agreement.first_drift
            results[name] = Found(
                problems=agreement.problems,
                first=first.theirs if first else "",
                drifting=[row.theirs for row in agreement.rows if row.drifts],
                logits=agreement.logits_worst,
                generated=(agreement.generated_same, agreement.generated),
                rows=len(agreement.rows),
            )
    return results


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By family: a checkpoint with scrambled weights, and its directory."""
    made = {}
    for family, model in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        path = scrambled(trained(folder / "run", recipe_of(model), world=1), folder / "scrambled")
        made[family] = (path, exported(path, folder / "theirs", model))
    return made


def swapped(tensors: Tensors, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def heads_out_of_order(tensors: Tensors, name: str, head_dim: int) -> None:
    heads = tensors[name].unflatten(0, (-1, head_dim))
    tensors[name] = heads[torch.arange(len(heads)).roll(1)].flatten(0, 1)


def fused_as_three(tensors: Tensors, prefix: str, model: ModelConfig, index: int) -> None:
    """Megatron's fused projection cut in three, as if it were all queries, all keys, all values."""
    from train.hf.mapping import to_ours

    pair = next(p for p in pairs(model, "nemotron_h") if p.move == "groups" and f"{prefix}q_proj.weight" in p.theirs)
    (fused,) = to_ours(pair, [tensors[name] for name in pair.theirs])
    sizes = [shape[0] for shape in pair.theirs.values()]
    tensors.update(zip(pair.theirs, fused.split(sizes), strict=True))


def off_by_one(tensors: Tensors, layers: list[str]) -> None:
    """Every listed layer has the weights of the one before."""
    old = dict(tensors)
    for here, before in zip(layers, layers[-1:] + layers[:-1], strict=True):
        for name in old:
            if name.startswith(f"{here}."):
                tensors[name] = old[before + name.removeprefix(here)]


def transposed_convolution(tensors: Tensors, name: str) -> None:
    channels, _, taps = tensors[name].shape
    tensors[name] = tensors[name].reshape(taps, channels).T.reshape(channels, 1, taps)


L, G = "backbone.layers.", "model.layers."
NEMOTRON_FAULTS: dict[str, tuple[str, Callable[[Tensors], None]]] = {
    "query heads in another order": (f"{L}3", lambda t: heads_out_of_order(t, f"{L}3.mixer.q_proj.weight", 16)),
    "key heads in another order": (f"{L}3", lambda t: heads_out_of_order(t, f"{L}3.mixer.k_proj.weight", 16)),
    "groups not taken apart": (f"{L}3", lambda t: fused_as_three(t, f"{L}3.mixer.", HYBRID, 3)),
    "keys and values under each other's names": (
        f"{L}3", lambda t: swapped(t, f"{L}3.mixer.k_proj.weight", f"{L}3.mixer.v_proj.weight")),
    "Mamba layers off by one": (f"{L}0", lambda t: off_by_one(t, [f"{L}0", f"{L}2", f"{L}5"])),
    "MLP layers off by one": (f"{L}1", lambda t: off_by_one(t, [f"{L}1", f"{L}4", f"{L}7"])),
    "convolution transposed": (f"{L}2", lambda t: transposed_convolution(t, f"{L}2.mixer.conv1d.weight")),
    "convolution backwards": (
        f"{L}2", lambda t: t.update({f"{L}2.mixer.conv1d.weight": t[f"{L}2.mixer.conv1d.weight"].flip(-1)})),
    "x and z in the other's place": (
        f"{L}5", lambda t: t.update({f"{L}5.mixer.in_proj.weight": torch.cat(
            [t[f"{L}5.mixer.in_proj.weight"][i] for i in (slice(128, 256), slice(0, 128), slice(256, None))])})),
    "B and C in the other's place": (
        f"{L}5", lambda t: t.update({f"{L}5.mixer.in_proj.weight": torch.cat(
            [t[f"{L}5.mixer.in_proj.weight"][i] for i in
             (slice(0, 256), slice(288, 320), slice(256, 288), slice(320, None))])})),
    "A_log under the name of D": (f"{L}0", lambda t: swapped(t, f"{L}0.mixer.A_log", f"{L}0.mixer.D")),
    "gated norm of another layer": (
        f"{L}2", lambda t: swapped(t, f"{L}2.mixer.norm.weight", f"{L}5.mixer.norm.weight")),
    "norms of two layers": (f"{L}3", lambda t: swapped(t, f"{L}3.norm.weight", f"{L}4.norm.weight")),
    "final norm": ("final norm", lambda t: t.update({"backbone.norm_f.weight": t[f"{L}7.norm.weight"]})),
    "embedding for the head": ("logits", lambda t: t.update({"lm_head.weight": t["backbone.embeddings.weight"]})),
    "embedding shifted by a row": (
        "embedding", lambda t: t.update({"backbone.embeddings.weight": t["backbone.embeddings.weight"].roll(1, 0)})),
}  # fmt: skip
GEMMA_FAULTS: dict[str, tuple[str, Callable[[Tensors], None]]] = {
    "gate and up": (f"{G}1", lambda t: swapped(t, f"{G}1.mlp.gate_proj.weight", f"{G}1.mlp.up_proj.weight")),
    "query heads in another order": (f"{G}2", lambda t: heads_out_of_order(t, f"{G}2.self_attn.q_proj.weight", 16)),
    "blocks off by one": (f"{G}0", lambda t: off_by_one(t, [f"{G}0", f"{G}1", f"{G}2"])),
    "norms before and after": (
        f"{G}1", lambda t: swapped(t, f"{G}1.input_layernorm.weight", f"{G}1.post_attention_layernorm.weight")),
    "norm with the one added": (
        f"{G}0", lambda t: t.update({f"{G}0.pre_feedforward_layernorm.weight":
                                     t[f"{G}0.pre_feedforward_layernorm.weight"] + 1})),
    "one channel of a million": (f"{G}2", lambda t: t[f"{G}2.mlp.down_proj.weight"][5].mul_(1.05)),
}  # fmt: skip
FAULTS = {"nemotron_h": NEMOTRON_FAULTS, "gemma2": GEMMA_FAULTS}
CONFIG_FAULTS: dict[str, tuple[str, dict[str, object]]] = {
    "local for global": (
        f"{G}0", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "window a token short": (f"{G}0", {"sliding_window": 19}),
    "scores by head width": (f"{G}0", {"query_pre_attn_scalar": 16}),
    "scores not capped": (f"{G}0", {"attn_logit_softcapping": None}),
    "logits not capped": ("logits", {"final_logit_softcapping": None}),
    "another base": (f"{G}0", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}  # fmt: skip


def broken(directory: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of a directory with changed tensors; names and shapes stay."""
    folder.mkdir()
    shutil.copyfile(directory / "config.json", folder / "config.json")
    tensors = {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}
    shapes = {name: t.shape for name, t in tensors.items()}
    change(tensors)
    assert {name: t.shape for name, t in tensors.items()} == shapes
    save_file(
        {name: t.clone().contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fault_is_refused_and_the_first_block_named(
    family: str, ready: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, directory = ready[family]
    folders = {"none": directory}
    for number, (name, (_, change)) in enumerate(FAULTS[family].items()):
        folders[name] = broken(directory, tmp_path / str(number), change)
    expected = {name: place for name, (place, _) in FAULTS[family].items()}
    if family == "gemma2":
        for number, (name, (place, fields)) in enumerate(CONFIG_FAULTS.items()):
            folders[name] = broken(directory, tmp_path / f"config{number}", lambda tensors: None)
            config = json.loads((directory / "config.json").read_text()) | fields
            (folders[name] / "config.json").write_text(json.dumps(config))
            expected[name] = place
    found = run_ranks(1, found_in, checkpoint, FAMILIES[family], folders, True)[0]
    right = found.pop("none")
    assert right.problems == [] and right.logits < 1e-5 and right.generated == (20, 20)
    assert {name: one.first for name, one in found.items()} == expected
    assert all(one.problems for one in found.values())
    if family == "nemotron_h":  # each block is measured on the same input: the others are not blamed
        assert found["norms of two layers"].drifting == [f"{L}3", f"{L}4"]
        assert found["Mamba layers off by one"].drifting == [f"{L}0", f"{L}2", f"{L}5"]
    model = FAMILIES[family]
    stored = StoredTensors(checkpoint)
    assert different_weights(stored, WeightFiles(directory), model=model, vocab=None) == []
    name = next(iter(FAULTS[family]))
    assert different_weights(stored, WeightFiles(folders[name]), model=model, vocab=None)


def test_transformers_clamp_on_dt_is_seen_and_can_be_opened(
    ready: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Published configs have time_step_min 0.001: transformers then clamps dt, which no trainer did."""
    checkpoint, directory = ready["nemotron_h"]
    folder = broken(directory, tmp_path / "clamped", lambda tensors: None)
    config = json.loads((directory / "config.json").read_text()) | {"time_step_min": 0.05}
    (folder / "config.json").write_text(json.dumps(config))
    assert run_ranks(1, found_in, checkpoint, HYBRID, {"x": folder}, True)[0]["x"].first.startswith(L)
    assert run_ranks(1, found_in, checkpoint, HYBRID, {"x": folder}, False)[0]["x"].problems == []


def test_a_greedy_text_that_meets_the_end_of_text_token_is_no_disagreement(
    ready: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """transformers' `generate` would forbid the token; here every token ends a text."""
    for family, (checkpoint, directory) in ready.items():
        folder = broken(directory, tmp_path / family, lambda tensors: None)
        config = json.loads((directory / "config.json").read_text())
        ends = list(range(config["vocab_size"]))
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        found = run_ranks(1, found_in, checkpoint, FAMILIES[family], {"x": folder}, True)[0]["x"]
        assert found.problems == [] and found.generated == (20, 20)


@pytest.mark.parametrize(
    "model",
    [
        replace(GEMMA, rope_scaling="linear", rope_factor=4.0),
        replace(GEMMA, rope_scaling="yarn", rope_factor=4.0, rope_original_tokens=32),
        replace(GEMMA, rope_scaling="llama3", rope_factor=8.0, rope_original_tokens=32),
        replace(GEMMA, attention_softcap=None, logit_softcap=None, query_scale=None, pattern="*-*-"),
        replace(HYBRID, pattern="*-M", activation="silu", mamba_groups=4, mamba_chunk=7, head_dim=8),
        replace(HYBRID, pattern="MM-", activation="gelu", mamba_groups=1, tie_embeddings=True),
        replace(HYBRID, pattern="ME*E", experts=ExpertsConfig(count=6, top_k=3, ffn=24, shared_ffn=40, scaling=2.5)),
        replace(
            HYBRID,
            pattern="E-E",
            experts=ExpertsConfig(count=8, top_k=4, ffn=16, shared_ffn=8, groups=4, top_groups=2, latent=24),
        ),
        replace(HYBRID, pattern="*E", experts=ExpertsConfig(count=3, top_k=1, ffn=40, shared_ffn=8)),
        replace(HYBRID, pattern="M*", mtp=MtpConfig(depths=2), tie_embeddings=True),  # transformers ignores the depths
    ],
    ids=lambda model: f"{model.pattern} {model.rope_scaling} {model.activation}",
)
def test_other_members_of_the_families_agree(model: ModelConfig, tmp_path: Path) -> None:
    path = scrambled(trained(tmp_path / "run", recipe_of(model), world=1), tmp_path / "scrambled")
    folder = exported(path, tmp_path / "theirs", model)
    found = run_ranks(1, found_in, path, model, {"x": folder}, True)[0]["x"]
    assert found.problems == [] and found.logits < 1e-5 and found.generated == (20, 20)


def test_a_pair_keeps_its_order() -> None:
    """Tensors of a pair go in and out by position; a table entry that lists them in another order would be a fault."""
    for family, model in FAMILIES.items():
        for pair in pairs(model, family):  # type: ignore[arg-type]
            ours = [torch.zeros(shape) for shape in pair.ours.values()]
            assert [tuple(t.shape) for t in to_theirs(pair, ours)] == list(pair.theirs.values())

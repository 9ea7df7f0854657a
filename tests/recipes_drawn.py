"""Random recipes over all fields, with prepared data and checkpoints that are valid, wrong, damaged or missing."""

import dataclasses
import shutil
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from shards import random_documents, write_folder
from teachers import TEACHER, save_teacher
from tiny import RECIPE, with_fields

from recipes.schema.data import PhaseConfig, SourceConfig
from recipes.schema.fields import Range
from recipes.schema.manifest import manifest_text, read_manifest
from recipes.schema.precision import LinearRule
from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe

VOCAB = 300
_NUMBERS: dict[type, list[Any]] = {int: [0, 1, 2, 3, 4, 8, 16, 2**63 - 1], float: [0.0, 1e-3, 0.5, 1.0, 2.0]}
_PATTERNS = ["M-M*", "M|-M*", "*-", "w-*-", "M", "M-M*-M-M*-", "M-X", "", "M||-", "ME*E"]
_SLOW = {"run.steps", "model.hidden", "model.vocab", "model.ffn", "precision.amax_history", "model.mamba_state",
         "model.mamba_conv", "model.mamba_chunk", "model.experts.count", "model.experts.ffn", "model.experts.shared_ffn",
         "model.experts.latent",
         "data.prefetch_steps", "data.read_threads", "data.workers", "run.threads"}  # fmt: skip
"""Fields whose large values cost time or memory: small ones only."""


@dataclass(frozen=True)
class Place:
    """A disk with prepared data and checkpoints."""

    base: Recipe
    choices: dict[str, list[Any]]
    """Values of fields that name files, or whose type alone does not give useful values."""


def place_in(folder: Path) -> Place:
    """Prepare data; write a teacher, one of another vocabulary, one of another tokenizer, a damaged one, a run."""
    manifest = write_folder(
        folder / "data", {name: [random_documents(120, seed=3)] for name in ("a", "b")}, vocab=VOCAB
    )
    base = replace(
        RECIPE,
        run=replace(RECIPE.run, name="new", folder=str(folder), device="auto", global_rows=8),
        model=replace(RECIPE.model, pattern="M-M*", vocab=VOCAB + 4),
        data=replace(RECIPE.data, folder=str(folder / "data"), row_tokens=32,
                     sources={name: SourceConfig(path="made by hand") for name in ("a", "b")}),
    )  # fmt: skip
    ours, wide = manifest.tokenizer.fingerprint, replace(TEACHER, model=replace(TEACHER.model, vocab=VOCAB + 4))
    good = save_teacher(folder / "teacher", wide, tokenizer=ours)
    of_base = save_teacher(folder / "same", base, tokenizer=ours)
    _copy(of_base, folder / "began", recipe=recipe_mapping(replace(base, run=replace(base.run, name="began"))))
    _copy(good, folder / "foreign", tokenizer="f" * 16)
    _copy(good, folder / "narrow", recipe=recipe_mapping(TEACHER))
    (_copy(good, folder / "damaged") / "manifest.json").write_text("{}")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("years of work")
    checkpoints = [None, str(good), *(str(folder / n) for n in ("teacher", "foreign", "narrow", "damaged", "nowhere"))]
    sources = base.data.sources
    return Place(
        base,
        {
            "run.name": ["new", "two words", "a/b", "", " ", "..", "/abs", "a//b", "a\nb", "thesis", "began", "x" * 300],
            "run.folder": [str(folder)],
            "run.start_from": [None, None, str(of_base), *checkpoints[1:]],
            "run.steps": [8, 40],
            "model.pattern": _PATTERNS,
            "precision.rules": [(), (LinearRule("none", kinds="M"),), (LinearRule("mxfp8", linears="mlp.*", last_fraction=0.5),)],
            "model.mtp.pattern": ["*-", "M", "*E", "X", "", "*|-"],
            "model.vocab": [VOCAB + 4, VOCAB, 256, 512],
            "data.folder": [str(folder / "data"), str(folder / "data"), str(folder / "empty")],
            "data.sources": [
                sources,
                {"a": sources["a"]},
                {**sources, "more": SourceConfig(path="nowhere")},
                {"a": replace(sources["a"], weight=0.0)},
                {**sources, "b": replace(sources["b"], heldout_fraction=1.0)},
                {**sources, "b": replace(sources["b"], max_epochs=0.5)},
                {**sources, "b": replace(sources["b"], kind="chat")},
                {"b": replace(sources["b"], kind="preference")},
                {},
            ],
            "data.phases": [(), (PhaseConfig(64, {"a": 1.0}),), (PhaseConfig(64, {"z": 1.0}),), (PhaseConfig(64, {"a": 0.0}),)],
            "data.row_tokens": [32, 64, 24, 17, 4096],
            "data.tokenizer.end_of_document": ["<|endoftext|>", "</s>"],
            "data.tokenizer.path": [None], "data.tokenizer.pattern": [None], "data.tokenizer.special_tokens": [{}],
            "data.chat.template": ["chatml", "plain", str(folder / "mine.jinja")],
            "data.cache.folder": [str(folder / "cache")],
            "data.fim.prefix": ["<|fim_prefix|>", "<|endoftext|>"],
            "data.fim.suffix": ["<|fim_suffix|>", "<|endoftext|>"],
            "data.fim.middle": ["<|fim_middle|>", "<|endoftext|>"],
            "objective.teacher": checkpoints, "objective.teacher_cache": [None, str(folder / "no_answers")],
            "objective.hidden_layers": ["final", "3:5", "0:0,3:3", "x"],
            "evaluate.sample_prompts": [(), (), ("Once upon",)],
            "evaluate.tasks": [(), ("needle-1k",), ("words-1k",), ("bfcl/parallel",), ("nedle",), (str(folder / "mine.yaml"),)],
            "checkpoint.allow": [(), ("data_order", "arithmetic")],
            "schedule.warmup": [0, 4, 50, 0.25], "schedule.decay": [0, 4, 0.5],
            "telemetry.wandb_project": ["stratum"], "telemetry.trackio_project": ["stratum"],
            "telemetry.mlflow": [None, "sqlite:///mlflow.db"], "telemetry.mlflow_experiment": ["stratum"],
            "launch.environment": ["", "NCCL_DEBUG=INFO", "NCCL_DEBUG", "'"],
        },
    )  # fmt: skip


def _copy(checkpoint: Path, run: Path, **changes: Any) -> Path:
    """Copy a checkpoint into another run, with a changed manifest. -> its folder."""
    copy = run / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    (copy / "manifest.json").write_text(manifest_text(replace(read_manifest(checkpoint), **changes)))
    return copy


def recipes(place: Place) -> st.SearchStrategy[Recipe]:
    """The base with up to six fields, anywhere in the recipe, set to other values of their types and ranges."""
    fields = sorted(_fields(Recipe, "", place.choices).items())
    one = st.sampled_from(fields).flatmap(lambda field: st.tuples(st.just(field[0]), st.sampled_from(field[1])))
    hard = [item for item in fields if item[0].startswith(("objective.", "precision.", "parallel.", "run.", "data."))]
    often = st.sampled_from(hard).flatmap(lambda field: st.tuples(st.just(field[0]), st.sampled_from(field[1])))
    distil = st.just([("objective.kind", "distill"), ("objective.teacher", place.choices["objective.teacher"][1])])
    low = st.sampled_from(["current", "blockwise", "delayed", "nvfp4", "mxfp8", "unscaled"]).map(
        lambda scaling: [("precision.scaling", scaling)]
    )
    first = st.one_of(st.just([]), distil, low)
    return st.builds(
        lambda first, changes: with_fields(place.base, dict([*first, *changes])),
        first,
        st.lists(st.one_of(one, often), max_size=6),
    )


def _fields(cls: type, prefix: str, choices: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Dotted field -> values to try: those of `choices`, else some of its type and range."""
    found: dict[str, list[Any]] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        if key in choices:
            found[key] = choices[key]
        elif dataclasses.is_dataclass(hints[field.name]):
            found |= _fields(hints[field.name], f"{key}.", choices)
        elif values := _values(hints[field.name], key):
            found[key] = values
    return found


def _values(hint: Any, key: str) -> list[Any]:
    bounds: Range | None = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, bounds = typing.get_args(hint)[:2]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return list(arguments)
    if type(None) in arguments:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return [None, *_values(inner, key)]
    if hint is bool:
        return [False, True]
    values = _NUMBERS.get(hint, [])
    most = 64 if key in _SLOW else 16 if not key.endswith("seed") else 2**63
    return [value for value in values if (bounds is None or bounds.admits(value)) and value <= most]

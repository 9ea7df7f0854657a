"""Compares two recipes of one run: which fields changed, what each change does to the run, and whether a resume allows it."""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recipes.schema.errors import RecipeError
from recipes.schema.model import ModelConfig
from recipes.schema.optim import ScheduleConfig
from recipes.schema.read import recipe_mapping
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import RECIPE, recipe_in
from recipes.schema.schedule import lengths_of
from recipes.schema.typed import FieldError, build

Kind = Literal["safe", "data order", "arithmetic", "another run"]
"""What a changed field does to a run that continues. `safe`: nothing but rounding. `data order`: other rows. `arithmetic`: other
numbers from the same rows. `another run`: checkpoints or step counts become meaningless."""

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "run.folder", "run.name", "run.device", "run.threads", "run.stop_after_steps",
            "run.deterministic", "run.start_from", "run.profile", "run.profile_ranks", "run.profile_memory",
            "run.garbage_every_steps", "run.memory_copies", "run.storage", "run.integrity", "objective.teacher_tensor",
            "objective.chunk_tokens", "parallel",
            "objective.dpo.reference_log_probs",
            "precision.backend", "precision.health", "precision.health_policy", "precision.health_floor_db",
            "checkpoint", "evaluate", "telemetry", "launch", "data.folder", "data.workers", "data.prefetch_steps",
            "data.read_threads", "data.cache", "data.verify", "data.stall_warning_s", "data.stall_limit_s",
            "generate", "model.mamba_chunk", "model.init_std", "objective.grpo.generation_rows",
            "objective.grpo.log_prob_gap", "objective.grpo.mean_log_prob_gap", "objective.grpo.allowed_functions",
            "objective.grpo.samples_every_steps", "objective.grpo.verifier_gib",
        ),
        "safe",
    ),
    **dict.fromkeys(
        (
            "model.norm_eps", "model.rope_base", "model.rope_scaling", "model.rope_factor", "model.rope_original_tokens",
            "model.window_tokens", "model.query_scale", "model.attention_softcap", "model.logit_softcap",
            "model.vocab_padding", "model.experts.top_k", "model.experts.score", "model.experts.groups",
            "model.experts.top_groups", "model.experts.scaling", "model.experts.capacity", "model.experts.bias_rate",
            "model.experts.aux_loss", "model.experts.aux_coefficient", "model.mtp.loss_scale",
            "model.lora.alpha",
        ),
        "arithmetic",
    ),
    **dict.fromkeys(
        (
            "model", "optim.kind", "run.global_rows", "data.row_tokens", "objective.grpo.prompts_per_step",
            "objective.grpo.generations_per_prompt", "objective.grpo.updates_per_batch", "objective.grpo.passes_per_batch",
            "objective.grpo.off_policy_steps",
        ),
        "another run",
    ),
    **dict.fromkeys(("data", "objective.grpo.prompts"), "data order"),
}  # fmt: skip
"""{field or group: kind}. The longest matching name decides. A field that is not listed changes arithmetic."""


@dataclass(frozen=True)
class Difference:
    """One field that differs between two recipes."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {self.old} in the run's folder, {self.new} now"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """Fields that differ between two resolved recipes, by name. A field that is missing in `old` has its default there."""
    before, after = _flat(old), _flat(new)
    found = []
    for key in sorted(before.keys() | after.keys()):
        then, now = before.get(key, _default(key)), after.get(key)
        if then != now and not _is_same_length(key, old, new):
            found.append(Difference(key, then, now, _kind(key, new)))
    return found


def _is_same_length(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether warm-up or decay has the same length in both recipes, maybe once in steps or tokens and once as a fraction."""
    if key not in ("schedule.warmup", "schedule.decay"):
        return False
    name, found = key.removeprefix("schedule."), []
    for plain in (old, new):
        try:
            lengths = lengths_of(
                build(ScheduleConfig, plain["schedule"], "schedule"),
                total_steps=plain["run"]["steps"],
                tokens_per_step=plain["run"]["global_rows"] * plain["data"]["row_tokens"],
            )
        except (KeyError, TypeError, FieldError):
            return False
        found.append(getattr(lengths, name))
    return found[0] == found[1]


def refused(changes: list[Difference], allowed: Sequence[str]) -> str | None:
    """Why a run must not continue with these changes; None if it may. allowed: `checkpoint.allow`."""
    words = {kind.replace("_", " ") for kind in allowed} | {"safe"}
    forbidden = [change for change in changes if change.kind not in words]
    if not forbidden:
        return None
    lines = "".join(f"\n  {change}  ({_meaning(change.kind)})" for change in forbidden)
    if any(change.kind == "another run" for change in forbidden):
        return f"{lines}\nChoose another run.name to start a new run, or undo the changes to continue this one."
    kinds = ",".join(dict.fromkeys(change.kind.replace(" ", "_") for change in forbidden))
    if any(change.key.startswith("data.sources.") and change.key.endswith(".weight") for change in forbidden):
        lines += (
            "\nA weight counts from row 0, so some rows may be read again. To change it from here on, add a phase to "
            "data.phases."
        )
    return (
        f"{lines}\nUndo the changes to continue this run, add checkpoint.allow=[{kinds}] to continue it with them, or "
        f"choose another run.name to start a new run."
    )


def replaces_head(saved: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a reward model's run starts from the weights of a language model: its head is left out, and a scalar one is drawn.
    No other field of the model may differ. saved: the checkpoint's resolved recipe."""
    model = saved.get("model") or {}
    return recipe.model.head == "scalar" and model.get("head", _default("model.head")) == "vocabulary"


def mtp_change(saved: dict[str, Any], recipe: Recipe) -> Literal["none", "left out", "drawn"]:
    """What happens to the further depths (`model.mtp`) when a run starts from a checkpoint's weights: those of the checkpoint may
    be left out, and those of the recipe be drawn. saved: the checkpoint's resolved recipe."""
    mtp = (saved.get("model") or {}).get("mtp") or {}
    had, has = mtp.get("depths", 0) > 0, recipe.model.mtp.depths > 0
    return "none" if had == has else ("left out" if had else "drawn")


def draws_adapters(saved: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a run with adapters (`model.lora`) starts from the weights of a model without: the adapters are drawn. saved: the
    checkpoint's resolved recipe."""
    lora = (saved.get("model") or {}).get("lora") or {}
    return recipe.model.lora.rank > 0 and not lora.get("rank")


def check_same_function(saved: dict[str, Any], recipe: Recipe, *, place: str, except_head: bool = False) -> None:
    """RecipeError if this recipe's model computes another function with a checkpoint's weights than the one they were trained
    as. Shapes can match while activations, norms, angles or heads differ, and the loss would not show it for a long time.

    saved: the checkpoint's resolved recipe. If it has no model, nothing is compared. except_head: compare up to the last hidden
    state (`replaces_head`). `checkpoint.allow` permits differences:
    `arithmetic` those that a resume may have with the same word, `another_function` all others.
    """
    words = {"safe", *(kind.replace("_", " ") for kind in recipe.checkpoint.allow)}
    if "another function" in words:
        words.add("another run")
    if except_head and saved.get("model"):
        saved = {**saved, "model": {**saved["model"], "head": recipe.model.head}}
    if draws_adapters(saved, recipe) and saved.get("model"):
        saved = {**saved, "model": {**saved["model"], "lora": recipe_mapping(recipe)["model"]["lora"]}}
    changes = [change for change in function_changes(saved, recipe_mapping(recipe)) if change.kind not in words]
    if not changes:
        return
    needed = dict.fromkeys("arithmetic" if change.kind == "arithmetic" else "another_function" for change in changes)
    lines = "".join(
        f"\n  {change.key}: {change.old} in the checkpoint, {change.new} in the recipe" for change in changes
    )
    raise RecipeError(
        f"the weights of {place} were trained as another function than this recipe's model:{lines}\nUndo the "
        f"changes, or add checkpoint.allow=[{','.join(needed)}] to use the weights in this model."
    )


def function_changes(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Fields of the model on which two resolved recipes disagree; those of kind `safe` leave the function of the weights alone.

    Empty if a recipe is not known.
    """
    if not a.get("model") or not b.get("model"):
        return []
    return differences({"model": _effective(a["model"])}, {"model": _effective(b["model"])})


def _effective(model: dict[str, Any]) -> dict[str, Any]:
    """A model's fields without those that do not change its function.

    These are fields of layers it does not have, fields of rotary angles it does not use, and cuts between pipeline stages. A
    query scale left to its default is written out.
    """
    plain = {field.name: _default(f"model.{field.name}") for field in dataclasses.fields(ModelConfig)} | model
    kinds = set(str(plain["pattern"]))
    plain["pattern"] = str(plain["pattern"]).replace("|", "")
    if not (plain["lora"] or {}).get("rank"):
        plain.pop("lora")  # alpha and targets of no adapters
    plain.pop("mtp", None)  # further depths do not change what predicts the next token; `mtp_change` compares them
    plain["query_scale"] = plain["query_scale"] or plain["head_dim"]
    unused = [] if kinds & {"*", "w"} else _ATTENTION
    unused = unused if "w" in kinds else [*unused, "window_tokens"]
    unused = unused if plain["head"] == "vocabulary" else [*unused, "tie_embeddings", "logit_softcap"]
    unused = unused if "-" in kinds else [*unused, "ffn"]
    unused = unused if kinds & {"-", "E"} else [*unused, "activation"]
    if "E" in kinds and isinstance(plain["experts"], dict):
        plain["experts"] = {name: value for name, value in plain["experts"].items() if name not in _BALANCE}
    else:
        unused = [*unused, "experts"]
    unused = unused if "M" in kinds else [*unused, *(name for name in plain if name.startswith("mamba_"))]
    if plain["position"] == "none" or not kinds & {"*", "w"}:
        unused = [*unused, *(name for name in plain if name.startswith("rope_"))]
    elif plain["rope_scaling"] == "none":
        unused = [*unused, "rope_factor", "rope_original_tokens"]
    elif plain["rope_scaling"] == "linear":
        unused = [*unused, "rope_original_tokens"]
    return {name: value for name, value in plain.items() if name not in unused}


_BALANCE = ("bias_rate", "aux_loss", "aux_coefficient")
"""Fields of experts that matter in training only."""
_ATTENTION = ["heads", "kv_heads", "head_dim", "qk_norm", "query_scale", "attention_softcap", "position"]


def _meaning(kind: Kind) -> str:
    return "a fixed property of a run" if kind == "another run" else f"changes {'the ' * (kind == 'data order')}{kind}"


def _kind(key: str, new: dict[str, Any]) -> Kind:
    if key == "run.steps":
        schedule = new.get("schedule", {})
        ends = schedule.get("kind") in ("cosine", "linear") or (schedule.get("kind") == "wsd" and schedule.get("decay"))
        ends = ends or (isinstance(schedule.get("warmup"), float) and schedule["warmup"] > 0)  # a fraction of the run
        return "arithmetic" if ends and schedule.get("total") is None else "safe"
    if key == "run.microbatch_rows":
        model = new.get("model") or {}
        experts = model.get("experts") or {}
        counts = experts.get("aux_loss") == "microbatch" or experts.get("capacity") is not None
        return "arithmetic" if "E" in str(model.get("pattern")) and counts else "safe"
    matches = [name for name in _KINDS if key == name or key.startswith(f"{name}.")]
    return _KINDS[max(matches, key=len)] if matches else "arithmetic"


def _default(key: str) -> Any:
    """Default of a dotted field, as YAML writes it; None without one."""
    cls: Any = Recipe
    *groups, name = key.split(".")
    for group in groups:
        if typing.get_origin(cls) is dict:  # `group` is a key, such as a source's name
            cls = typing.get_args(cls)[1]
            continue
        cls = typing.get_type_hints(cls).get(group)
        if not (dataclasses.is_dataclass(cls) or typing.get_origin(cls) is dict):
            return None
    if not dataclasses.is_dataclass(cls):
        return None
    field = next((field for field in dataclasses.fields(cls) if field.name == name), None)
    if field is None or field.default is dataclasses.MISSING:
        return None
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def check_folder(folder: Path, recipe: Recipe) -> None:
    """RecipeError, with the fields that differ, if a run folder belongs to another recipe. Changes nothing on disk."""
    path = folder / RECIPE
    if not path.exists():
        own_files = (
            "logs",
            "lease",
            f".{path.name}.writing",
        )  # the launchers write the first two; a kill may leave the third
        other_files = [p.name for p in folder.iterdir() if p.name not in own_files] if folder.is_dir() else []
        if other_files:
            raise RecipeError(
                f"{folder} is not empty ({', '.join(sorted(other_files)[:3])}) and has no recipe.yaml, so it is not a "
                f"run of this project. Choose another run.name or run.folder."
            )
        return
    try:
        old = recipe_in(folder)
    except RecipeError as error:
        raise RecipeError(f"{error} Choose another run.name, or move {folder} away.") from error
    why = refused(differences(old, recipe_mapping(recipe)), recipe.checkpoint.allow)
    if why is not None:
        raise RecipeError(f"{folder} is a run of another recipe:{why}")

"""The model card of an exported directory: one page to judge and reproduce the model.

recipe, manifest of the checkpoint, metrics of its run, comparison with transformers --> README.md, recipe.yaml, loss.png
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipes.schema import units
from recipes.schema.credentials import mapping_without_credentials, without_credentials
from recipes.schema.foreign import in_markdown, printable
from recipes.schema.pattern import KINDS, counts, flops_per_token, parameters
from recipes.schema.read import recipe_mapping, recipe_yaml
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import as_number
from recipes.schema.scaling import describe_precision
from train.checkpoint.storage import Manifest
from train.hf.check import Agreement
from train.hf.config import SpecialTokens, family_of
from train.hf.convert import Converted
from train.hf.published import import_of
from train.report.summary import RunRecord, draw, read_run, unit_of

_ARTICLES = {
    "nemotron_h": ("Nemotron-H", "arXiv 2504.03624, 2508.14444"),
    "gemma2": ("Gemma 2", "arXiv 2408.00118"),
}


@dataclass(frozen=True)
class Release:
    """Everything a card is written from."""

    name: str
    recipe: Recipe
    manifest: Manifest
    checkpoint: Path
    converted: Converted
    tokens: SpecialTokens
    agreement: Agreement | None
    unchecked_because: str
    """Why `agreement` is missing."""
    stored_as: str
    """Format of the files' tensors."""
    license: str | None
    """Licence from `--license`, as an id of the hub."""
    origin: dict[str, Any]
    """Licence, language and origin from the card of the imported model."""


def write_card(folder: Path, release: Release) -> None:
    """Write README.md, recipe.yaml and, if the run still has metrics, loss.png into `folder`."""
    (folder / "recipe.yaml").write_text(recipe_yaml(mapping_without_credentials(release.manifest.recipe)))
    record = _record(release.checkpoint)
    if record is not None and record.steps:
        draw(record, folder / "loss.png", title=release.name, recipe=recipe_mapping(release.recipe))
    (folder / "README.md").write_text("\n".join(_page(release, record)) + "\n")


def _record(checkpoint: Path) -> RunRecord | None:
    run = checkpoint.parent.parent
    return read_run(run) if (run / "metrics.jsonl").exists() else None


def _page(release: Release, record: RunRecord | None) -> list[str]:
    recipe, manifest = release.recipe, release.manifest
    family = family_of(recipe.model)
    name, papers = _ARTICLES[family]
    is_reward = recipe.model.head == "scalar"
    about = "It is a base model: it continues text and was not trained to follow instructions."
    if is_reward:
        about = "It gives a chat one number, the reward of its last answer, and does not continue text."
    elif (lessons := _lessons(recipe)) is not None:
        about = f"It was trained last on {lessons}, with the chat template {_code(recipe.data.chat.template)}."
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if is_reward else "text-generation",
        "license": release.license or "unknown",
        "tags": [family, "reward-model" if is_reward else "chat" if _lessons(recipe) else "pretraining", "stratum"],
    } | {key: value for key, value in release.origin.items() if not (release.license and key.startswith("license"))}
    return [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {_text(release.name)}",
        "",
        f"A {'reward' if is_reward else 'language'} model of the {name} family ({papers}) with "
        f"{release.converted.parameters:,} parameters, after {manifest.tokens:,} tokens. {about}",
        "",
        *_model(release),
        *_use(release),
        *_evaluation(record, manifest.step),
        *_training(release, record),
        *_data(release),
        *_lineage(release, record),
        *_conversion(release),
    ]


def _lessons(recipe: Recipe) -> str | None:
    """What a model that answers chats was trained on; None if its data are texts."""
    match recipe.objective.kind:
        case "dpo":
            return "preferences (DPO)"
        case "grpo":
            return "rewards of its own answers (GRPO)"
        case _:
            return "chats" if recipe.data.conversations else None


def _model(release: Release) -> list[str]:
    model = release.recipe.model
    count = parameters(model)
    layers = ", ".join(f"{number} {KINDS[kind]}" for kind, number in counts(model.pattern).items() if number)
    tied = "" if model.has_own_head else "; the head is the embedding"
    return [
        "## Model",
        "",
        *_table(
            {
                "layers": f"{_code(model.pattern)} ({layers})",
                "hidden size": f"{model.hidden:,}",
                "parameters": f"{count.total:,}, of them {count.embedding + count.head:,} embedding and head{tied}",
                "vocabulary": f"{model.real_vocab:,}",
                "stored": f"{units.size(release.converted.nbytes)} in {release.stored_as}",
                "row length in training": f"{release.recipe.data.row_tokens:,} tokens",
                "training FLOPs per token": f"{flops_per_token(model, release.recipe.data.row_tokens).total:.4g}",
            }
        ),
    ]


def _use(release: Release) -> list[str]:
    kind = "AutoModelForCausalLM"
    code = [
        'prompt = tokenizer("Once", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))",
    ]
    if release.recipe.model.head == "scalar":
        kind = "AutoModelForSequenceClassification"
        code = [
            "# The reward is that of the last token, so a text ends with the token that ends the answer's turn.",
            'chat = tokenizer("...", return_tensors="pt")',
            "print(model(**chat).logits[0, 0])",
        ]
    return [
        "",
        "## Use",
        "",
        "```python",
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(release.name)})",
        f"model = {kind}.from_pretrained({json.dumps(release.name)})",
        *code,
        "```",
        "",
        "No code from this directory is run: transformers has the class built in.",
        *_versions(release),
    ]


def _versions(release: Release) -> list[str]:
    """The versions of transformers that compute the model correctly."""
    model = release.recipe.model
    if "M" not in model.pattern:
        return []
    return [
        "",
        f"Use transformers 5.14 or later, or 5.5 or earlier: versions 5.6 to 5.13 without mamba-ssm's kernels compute this "
        f"family wrongly beyond one chunk of {model.mamba_chunk} tokens.",
    ]


def _evaluation(record: RunRecord | None, step: int) -> list[str]:
    lines = ["", "## Evaluation", ""]
    scored = {at: tasks for at, tasks in record.tasks().items() if at <= step} if record is not None else {}
    if record is not None and not record.evaluations and scored:  # alignment: preferences, or tasks
        last = max(scored)
        lines += [
            f"Held-out preferences and tasks at step {last}:",
            "",
            "| source or task | items | metric | value |",
            "|---|---|---|---|",
        ]
        for name, entry in scored[last].items():
            for metric, found in entry["metrics"].items():
                pairs, shown = as_number(entry["items"]), as_number(found["value"])
                lines.append(f"| {_text(name)} | {pairs:g} | {_text(metric)} | {shown:.3f} |")
        return lines
    known = [at for at in record.evaluations if at <= step] if record is not None else []
    if record is None or not known:
        return [*lines, "No evaluation of this checkpoint was recorded."]
    first, last = min(known), max(known)
    lines += ["Held-out text of each source, bits per byte (comparable across tokenizers):", ""]
    lines += [f"| source | step {first} | step {last} |", "|---|---|---|"]
    for name, score in record.evaluations[last].items():
        before = record.evaluations[first].get(name, float("nan"))
        lines.append(f"| {_text(name)} | {before:.3f} | {score:.3f} |")
    if last != step:
        lines += ["", f"The checkpoint is of step {step}; the last evaluation before it was at step {last}."]
    return lines


def _training(release: Release, record: RunRecord | None) -> list[str]:
    recipe, manifest = release.recipe, release.manifest
    rows = {
        "steps": f"{manifest.step:,} of {recipe.run.steps:,}",
        "tokens": f"{manifest.tokens:,}, {recipe.run.global_rows * recipe.data.row_tokens:,} a step",
        "optimizer": f"{'Muon and ' * (recipe.optim.kind == 'muon')}AdamW, peak learning rate {recipe.optim.lr:g}, "
        f"betas {recipe.optim.beta1}/{recipe.optim.beta2}, weight decay {recipe.optim.weight_decay}, "
        f"clip {recipe.optim.clip_norm}",
        "schedule": f"{recipe.schedule.kind}, warm-up {recipe.schedule.warmup}, decay {recipe.schedule.decay} "
        f"({recipe.schedule.unit})",
        "precision": describe_precision(recipe.model, recipe.precision),
        "objective": recipe.objective.kind,
    }
    lines = ["", "## Training", "", *_table(rows), "", "The whole recipe: [recipe.yaml](recipe.yaml)."]
    if record is not None and record.steps:
        steps = [line for step, line in record.steps.items() if step <= manifest.step]
        lines += ["", "![training loss, learning rate and held-out bits per byte](loss.png)"]
        if steps:
            change = f"{steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}"
            unit = unit_of(recipe_mapping(recipe))
            lines += ["", f"Training loss {change}{f' nats per {unit}' if unit else ''}."]
    return lines


def _data(release: Release) -> list[str]:
    recipe, manifest = release.recipe, release.manifest
    total = sum(source.weight for source in recipe.data.sources.values())
    lines = ["", "## Data", ""]
    if manifest.data_hash:
        tokenizer = _code(manifest.tokenizer) if manifest.tokenizer else "not recorded"
        lines += [f"Data manifest {_code(manifest.data_hash)}; tokenizer {tokenizer}.", ""]
        lines += ["| source | share of rows | path |", "|---|---|---|"]
        for name, source in recipe.data.sources.items():
            lines.append(f"| {_text(name)} | {100 * source.weight / total:.1f} % | {_code(source.path)} |")
    else:
        lines.append("Not known: the weights were not trained by this project.")
    return lines


def _lineage(release: Release, record: RunRecord | None) -> list[str]:
    manifest = release.manifest
    run = release.recipe.run
    layout = ", ".join(f"{key} {value}" for key, value in manifest.layout.items() if value > 1) or "one process"
    rows = {
        "checkpoint": f"{_code(release.checkpoint.name)} of run {_code(run.name)}, position {manifest.position:,}",
        "layout": layout,
        "versions": _text(_listed(manifest.versions)),
        "started from": _code(run.start_from) if run.start_from else "random weights",
    }
    if manifest.tensors:
        rows["fingerprint of the weights"] = _code(manifest.fingerprint)
    if manifest.lineage:
        rows["lineage"] = _code(_listed(manifest.lineage) or ", ".join(manifest.lineage))
    if (origin := import_of(manifest.lineage)) is not None and origin is not manifest.lineage:
        rows["lineage of the import"] = _code(_listed(origin))
    if release.recipe.objective.teacher:
        rows["teacher"] = _code(release.recipe.objective.teacher)
    if record is not None and record.resumes:
        rows["resumed after steps"] = ", ".join(map(str, record.resumes))
    return ["", "## Lineage", "", *_table(rows)]


def _conversion(release: Release) -> list[str]:
    lines = ["", "## Conversion", ""]
    size = f"{release.converted.tensors:,} tensors, {units.size(release.converted.nbytes)}."
    if release.agreement is None:
        return [*lines, f"{size} **Not compared with transformers**: {_text(release.unchecked_because)}"]
    agreement = release.agreement
    lines += [f"{size} Compared with transformers' implementation, block by block:", ""]
    lines += [f"- {line}" for line in agreement.summary()]
    details = ["", "<details><summary>Every block</summary>", "", *agreement.table(), "", "</details>"]
    return [*lines, *details]


def _text(text: str) -> str:
    """A name or text from elsewhere, for a line or cell of Markdown."""
    return in_markdown(without_credentials(text))


def _code(text: str) -> str:
    """The same, shown as code."""
    shown = printable(without_credentials(text), most=300)
    return f"<code>{in_markdown(shown)}</code>" if set(shown) & set("`|\\<>") else f"`{shown}`"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if not isinstance(value, dict | list))


def _table(rows: dict[str, str]) -> Sequence[str]:
    """A table of names and values. The values are Markdown already."""
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]

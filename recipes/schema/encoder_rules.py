"""Rules between encoders and the rest of a recipe: data with media needs them, and they need data with media."""

from collections.abc import Sequence
from dataclasses import fields

from recipes.schema.encoders import encoder_shape_problems
from recipes.schema.errors import Problem
from recipes.schema.model import ModelConfig
from recipes.schema.recipe import Recipe


def encoder_problems(recipe: Recipe) -> list[Problem]:
    """Encoders that do not fit the data, the layout or the objective."""
    model, data, kind = recipe.model, recipe.data, recipe.objective.kind
    found = encoder_shape_problems(model.vision, model.audio, hidden=model.hidden, tensor=recipe.parallel.tensor)
    if data.media_sources and not model.has_encoders:
        name = data.media_sources[0]
        text = (
            f"data.sources.{name} has media, and the model has no encoders: it would learn from placeholders instead of images "
            f"and audio."
        )
        remedy = (
            "Set model.vision.layers=2 for images, model.audio.layers=2 for audio (docs/multimodal.md), or take the source out "
            "of data.sources."
        )
        found.append(Problem(f"data.sources.{name}.kind", text, remedy))
    found += _idle_problems(model)
    if not model.has_encoders:
        return found
    for name in ("vision", "audio"):
        if (layers := getattr(model, name).layers) and not data.media_sources:
            text = f"model.{name}.layers={layers} would never be trained: no source of data.sources has kind: media."
            remedy = f"Set model.{name}.layers=0, or add a source of images or audio."
            found.append(Problem(f"model.{name}.layers", text, remedy))
    pairs = [("vision.patch", model.vision.patch, "patch", data.media.patch)] if model.vision.layers else []
    if model.audio.layers:
        pairs.append(("audio.mels", model.audio.mels, "mels", data.media.mels))
        pairs.append(("audio.stride", model.audio.stride, "audio_stride", data.media.audio_stride))
    for name, ours, field, theirs in pairs:
        if ours != theirs:
            text = f"model.{name}={ours}, but data.media.{field}={theirs}: the encoder takes another shape than the data has."
            found.append(
                Problem(f"model.{name}", text, f"Use the same number for both, such as model.{name}={theirs}.")
            )
    if kind != "next_token":
        text = f"objective.kind={kind} does not train models with encoders ({_names(model)})."
        found.append(Problem("objective.kind", text, "Use objective.kind=next_token."))
    if model.mtp.depths:
        text = f"model.mtp.depths={model.mtp.depths} predicts from embeddings of tokens, and places of media have none."
        found.append(Problem("model.mtp.depths", text, "Use model.mtp.depths=0 in a model with encoders."))
    return found


def _idle_problems(model: ModelConfig) -> list[Problem]:
    """Fields of an encoder that the model does not have."""
    found = []
    for name in ("vision", "audio"):
        encoder = getattr(model, name)
        for field in fields(encoder) if not encoder.layers else ():
            if (value := getattr(encoder, field.name)) != field.default:
                text = f"model.{name}.{field.name}={value} does nothing, because model.{name}.layers=0."
                found.append(
                    Problem(
                        f"model.{name}.{field.name}", text, f"Set model.{name}.layers, such as 12, or leave it out."
                    )
                )
    return found


def without_encoders_problems(model: ModelConfig, *, place: str, what: str, key: str) -> list[Problem]:
    """A model with encoders where a tool does not support them. place: the checkpoint; what: the tool; key: its field."""
    if not model.has_encoders:
        return []
    text = f"{place} has encoders ({_names(model)}), which {what} does not support."
    return [Problem(key, text, "Name a model without encoders.")]


def media_placeholders(recipe: Recipe) -> tuple[str, ...]:
    """Special tokens that stand for images and audio in the rows of this model; none without encoders."""
    return (recipe.data.media.image_token, recipe.data.media.audio_token) if recipe.model.has_encoders else ()


def placeholder_problems(recipe: Recipe, prompts: Sequence[str], *, key: str) -> list[Problem]:
    """Prompts with placeholders of media, which generation would read as ordinary text. key: where the prompts are from."""
    found = [
        Problem(
            key,
            f"prompt {number} contains {name!r}, which stands for media; generation reads text only.",
            f"Remove {name!r}.",
        )
        for number, prompt in enumerate(prompts, 1)
        for name in media_placeholders(recipe)
        if name in prompt
    ]
    return found[:1]


def _names(model: ModelConfig) -> str:
    parts = [f"model.{name}.layers={getattr(model, name).layers}" for name in ("vision", "audio")]
    return " and ".join(part for part in parts if not part.endswith("=0"))

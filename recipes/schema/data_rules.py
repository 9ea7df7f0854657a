"""Rules of the `data` group: sources, chats, preferences, and the order of rows.

`recipes.schema.rules.problems` calls them, and so do the commands that read or write data.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.schema.data import DataConfig, PhaseConfig
from recipes.schema.errors import Problem


def data_problems(data: DataConfig) -> list[Problem]:
    """Problems with sources and phases that the recipe alone shows, without prepared data."""
    if not data.sources:
        text, remedy = "data.sources is empty.", "Name at least one source, e.g. data.sources.mine.path=texts/*.jsonl."
        return [Problem("data.sources", text, remedy)]
    found = [problem for name in data.sources for problem in source_problems(data, name)]
    found += chat_problems(data) + media_problems(data)
    weights = {name: source.weight for name, source in data.sources.items()}
    return found + order_problems(weights, data.phases, row_tokens=data.row_tokens)


def chat_problems(data: DataConfig) -> list[Problem]:
    """What a recipe with sources of chats or preferences excludes."""
    if not data.conversations:
        return []
    found, name = preference_problems(data), data.conversations[0]
    what = "preferences" if data.sources[name].kind == "preference" else "chats"
    if data.chats and not data.reset_at_documents and data.chat.packing == "rows":
        text = (
            f"source {name!r} has chats, of which a row holds several, and data.reset_at_documents=false lets them see each "
            f"other."
        )
        remedy = "Set reset_at_documents=true, or data.chat.packing=single."
        found.append(Problem("data.reset_at_documents", text, remedy))
    if data.fim.rate:
        text = (
            f"data.fim.rate={data.fim.rate:g} rearranges documents, but source {name!r} has {what}, whose order is what is "
            f"learned."
        )
        found.append(Problem("data.fim.rate", text, "Set it to 0."))
    if data.chat.template == "plain":
        text = "data.chat.template=plain does not end an answer: a model that learns it would never stop."
        found.append(Problem("data.chat.template", text, "Use turns, which ends it with the end-of-document token."))
    if data.chat.cut_thinking_min > data.chat.cut_thinking_max:
        text = (
            f"data.chat.cut_thinking_min={data.chat.cut_thinking_min} is above "
            f"cut_thinking_max={data.chat.cut_thinking_max}."
        )
        found.append(Problem("data.chat.cut_thinking_min", text, "Set it to at most that."))
    for name in data.conversations:
        source = data.sources[name]
        if source.format in ("text", "megatron"):
            text = f"data.sources.{name}.format={source.format} has no records with messages, which kind={source.kind} needs."
            found.append(Problem(f"data.sources.{name}.format", text, "Use jsonl, parquet or a set."))
        if source.template is not None:
            text = f"data.sources.{name}.template makes text of fields, but the source is of kind {source.kind}."
            found.append(Problem(f"data.sources.{name}.template", text, "Set data.chat.template instead."))
    return found


def media_problems(data: DataConfig) -> list[Problem]:
    """What a recipe with sources of media excludes."""
    found = []
    for name in data.media_sources:
        source = data.sources[name]
        if source.format in ("text", "megatron"):
            text = f"data.sources.{name}.format={source.format} has no records with parts, which kind=media needs."
            found.append(Problem(f"data.sources.{name}.format", text, "Use jsonl, parquet, webdataset or a set."))
        if source.template is not None:
            text = f"data.sources.{name}.template makes text of fields, but the source is of kind media."
            found.append(Problem(f"data.sources.{name}.template", text, "Leave it out."))
        if data.fim.rate:
            text = (
                f"data.fim.rate={data.fim.rate:g} rearranges documents, but source {name!r} has media, whose places would be "
                f"lost."
            )
            found.append(Problem("data.fim.rate", text, "Set it to 0."))
    if data.media_sources and data.media.image_token == data.media.audio_token:
        text = f"data.media.image_token and data.media.audio_token are both {data.media.image_token!r}."
        found.append(Problem("data.media.audio_token", text, "Name two special tokens."))
    for name, source in data.sources.items():
        if source.format == "webdataset" and source.kind != "media":
            text = f"data.sources.{name}.format=webdataset has samples of media, and kind={source.kind}."
            found.append(Problem(f"data.sources.{name}.kind", text, "Set kind to media."))
    return found


def preference_problems(data: DataConfig) -> list[Problem]:
    """What a recipe with sources of preferences excludes."""
    if not data.preferences:
        return []
    found, name = [], data.preferences[0]
    other = next((other for other, source in data.sources.items() if source.kind != "preference"), None)
    if other is not None:
        text = (
            f"data.sources.{name} has preferences and data.sources.{other} is of kind {data.sources[other].kind}: one run learns "
            f"from preferences or from documents."
        )
        remedy = (
            "Take one of them out of data.sources. A recipe leaves out the sources that it inherits with data/no_sources before "
            "_self_ in its defaults."
        )
        found.append(Problem(f"data.sources.{other}.kind", text, remedy))
    if not data.reset_at_documents:
        text = (
            f"data.sources.{name} has preferences, whose answers share a row, and data.reset_at_documents=false lets them see "
            f"each other."
        )
        found.append(Problem("data.reset_at_documents", text, "Set it to true."))
    for field in ("strip_thinking_fraction", "cut_thinking_fraction"):
        if fraction := getattr(data.chat, field):
            text = f"data.chat.{field}={fraction:g} changes answers, but those of data.sources.{name} were compared as they are."
            found.append(Problem(f"data.chat.{field}", text, "Set it to 0."))
    return found


def source_problems(data: DataConfig, name: str) -> list[Problem]:
    """Problems with a source's name, and with a source for evaluation only that training draws from."""
    found = []
    if not name or name != Path(name).name or name.startswith(".") or not name.isprintable():
        text = f"data.sources.{name!r}: the source's name becomes the name of a folder."
        found.append(Problem(f"data.sources.{name}", text, "Use letters, digits, - and _."))
    source = data.sources[name]
    if source.heldout_fraction == 1:
        drawn = [f"data.sources.{name}.weight={source.weight:g}"] if source.weight else []
        for index, phase in enumerate(data.phases):
            if phase.weights.get(name):
                drawn.append(f"data.phases[{index}].weights.{name}={phase.weights[name]:g}")
        if drawn:
            text = (
                f"data.sources.{name}.heldout_fraction=1 holds out the whole source for evaluation, but {drawn[0]} draws "
                f"from it."
            )
            key = f"data.sources.{name}.heldout_fraction"
            found.append(Problem(key, text, "Set the weight to 0, or hold out less."))
    return found


def order_problems(weights: Mapping[str, float], phases: Sequence[PhaseConfig], *, row_tokens: int) -> list[Problem]:
    """Problems with weights and phases: unknown sources, wrong order, all weights 0. weights: at the start, by source."""
    found, end = _weight_problems(weights, "data.sources"), 0
    for index, phase in enumerate(phases):
        where = f"data.phases[{index}]"
        unknown = [name for name in phase.weights if name not in weights]
        if unknown:
            text = f"{where}.weights names {', '.join(unknown)}, but data.sources has {', '.join(weights)}."
            found.append(Problem(f"{where}.weights", text, "Name sources of data.sources."))
        start, ramp = -(-phase.from_tokens // row_tokens), -(-phase.ramp_tokens // row_tokens)
        if start < max(1, end):
            text = (
                f"{where}.from_tokens={phase.from_tokens:,} is before the end of the previous phase and its ramp "
                f"({end * row_tokens:,} tokens)."
            )
            found.append(Problem(f"{where}.from_tokens", text, "Put phases in order, or shorten the ramp."))
        end = start + ramp
        found += _weight_problems(phase.weights, f"{where}.weights")
    return found


def _weight_problems(weights: Mapping[str, float], where: str) -> list[Problem]:
    if any(weights.values()):
        return []
    text = f"{where}: all weights are 0, so there is nothing to draw."
    return [Problem(where, text, "Give one source a weight above 0.")]

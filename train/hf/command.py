"""The commands of `stratum hf`: conversion, tokenizer, recipe or card, comparison, in this order.

Everything is written into a temporary folder next to the target. It is renamed to the target when the models agree.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from data.make.corpus import documents
from data.system.console import progress
from data.system.new_folder import new_folder
from data.tokenizer import Tokenizer, load_tokenizer
from recipes.schema import units
from recipes.schema.data import SourceConfig, TokenizerConfig
from recipes.schema.encoder_rules import without_encoders_problems
from recipes.schema.errors import BackendError, CheckpointError, DataError, RecipeError, refuse
from recipes.schema.foreign import printable_lines
from recipes.schema.lora import SUFFIX
from recipes.schema.lora_rules import folded_problems
from recipes.schema.model import ModelConfig
from recipes.schema.options import STRATUM
from recipes.schema.pattern import parameters
from recipes.schema.precision import PrecisionConfig
from recipes.schema.read import recipe_from_mapping, recipe_mapping
from recipes.schema.recipe import Recipe
from train.build import model_on_one_rank, open_tokenizer
from train.checkpoint import storage
from train.checkpoint.manager import checkpoint_at
from train.checkpoint.manifest import RunState
from train.checkpoint.tensors import StoredTensors
from train.hf import card, hub, published, tokens
from train.hf.check import Agreement, compare, load_theirs, their_ids, wrong_scan
from train.hf.config import CONFIG, NO_CLAMP, SpecialTokens, clamp_of, family_of, from_config, read_config, to_config
from train.hf.convert import different_weights, export_weights, import_weights, lossless_format
from train.hf.export_adapter import write_adapter
from train.hf.files import WeightFiles
from train.hf.quantize_export import Quantizer, open_quantizer, open_weights
from train.hf.recipe import Imported, imported_recipe, recipe_text
from train.megatron import choose_device

_BAR_FROM_BYTES = 100_000_000
_ROW_TOKENS = 257


@dataclass(frozen=True)
class CheckOptions:
    """Options of a comparison."""

    text: str
    rows: int
    row_tokens: int | None
    """None: 257, or two chunks of the scan plus one token if that is more."""
    dtype: str
    device: str
    tolerance: float | None
    open_clamp: bool
    quantizer: Quantizer | None
    """Rounds our model's weights before the comparison."""


def export_model(parsed: argparse.Namespace) -> int:
    if parsed.push is not None:
        hub.check_push(parsed.push)
    path, manifest = _checkpoint_at(parsed.checkpoint)
    recipe = _recipe_of(manifest.recipe, path)
    refuse(without_encoders_problems(recipe.model, place=str(path), what="export", key="checkpoint"))
    family_of(recipe.model)
    if parsed.adapter:
        _refuse_unused(parsed)
        return _export_adapter(parsed.out, StoredTensors(path), recipe)
    refuse(folded_problems(recipe.model, place=str(path), what="an export without --adapter", key="model.lora"))
    carried = published.published_of(path, manifest)
    if carried is None and published.import_of(manifest.lineage) is not None:
        _print(
            f"note: the folder {published.PUBLISHED} of the import is missing; config.json is written from the recipe alone."
        )
    found = _tokenizer_for(parsed, recipe, manifest)
    special = tokens.special_tokens(found[0]) if found else SpecialTokens(None, None, None)
    vocab = parsed.vocab or _published_vocab(manifest, recipe.model, found[0] if found else None)
    stored = StoredTensors(path)
    parsed.quantizer = quantizer = open_quantizer(parsed, recipe, path)
    name = parsed.name or parsed.out.name
    needed = sum(entry.nbytes for entry in stored.weights.values())
    with new_folder(parsed.out, needed=needed) as (folder, publish):
        with _bar(f"exporting {name}", folder, stored) as advance:
            converted = export_weights(
                stored,
                folder,
                model=recipe.model,
                format=parsed.dtype,
                vocab=vocab,
                file_bytes=int(parsed.file_gb * 1e9),
                quantizer=quantizer,
                advance=advance,
            )
        formats = {entry.dtype for entry in WeightFiles(folder, quantized=True).entries.values()}
        dtype = "bfloat16" if torch.bfloat16 in formats else "float32"
        stored_as = " and ".join(sorted(str(one).removeprefix("torch.") for one in formats if one.is_floating_point))
        if quantizer is not None:
            stored_as = f"{dtype}, linear layers {quantizer.form.name}"
        config = _config_for(parsed, recipe, manifest, carried=carried, special=special, dtype=dtype, vocab=vocab)
        if quantizer is not None:
            config |= quantizer.config
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        untouched = published.is_untouched(manifest)
        if carried is None:
            tokens.write_generation_config(folder, special)
        if found is not None:
            _write_tokenizer(folder, *found, recipe=recipe, carried=carried, untouched=untouched, config=config)
        elif carried is not None:
            published.restore(carried, folder, tokenizer=False)
        agreement, why = _compare_as_trained(
            parsed, recipe, config, checkpoint=path, folder=folder, with_template=not untouched
        )
        origin = published.card_fields(carried) if carried is not None else {}
        release = card.Release(
            name, recipe, manifest, path, converted, special, agreement, why, stored_as, parsed.license, origin
        )
        card.write_card(folder, release)
        if agreement is not None and agreement.problems:
            return _refuse(agreement, f"{parsed.out} was not written", config=config)
        if agreement is None and quantizer is not None and not parsed.no_check:
            raise BackendError(
                f"{parsed.out} was not written: quantised weights must be compared first. {why} See --no-check."
            )
        publish()
    _print(
        f"wrote {parsed.out}: {converted.parameters:,} parameters, {units.size(converted.nbytes)}, model card README.md"
    )
    if parsed.push is not None:
        _print(f"pushed to {hub.push(parsed.out, parsed.push)}")
    return _conclude(agreement, why, f"stratum hf check {parsed.checkpoint} {parsed.out}")


def _refuse_unused(parsed: argparse.Namespace) -> None:
    """RecipeError for options of an export that do nothing with --adapter."""
    names = ("push", "quantize", "calibrate", "keep", "tokenizer", "max_positions", "vocab", "license", "name")
    given = [name for name in names if getattr(parsed, name) is not None]
    given += ["dtype"] * (parsed.dtype != "keep")
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise RecipeError(f"{options} has no effect with --adapter. Leave it out, or export the folded model.")


def _export_adapter(out: Path, stored: StoredTensors, recipe: Recipe) -> int:
    """Write the adapters alone, for peft."""
    if not recipe.model.lora.rank:
        raise RecipeError(
            f"{stored.folder} has no adapters (model.lora.rank=0). Leave out --adapter to export the model."
        )
    needed = sum(tensor.nbytes for name, tensor in stored.weights.items() if SUFFIX in name)
    with new_folder(out, needed=needed) as (folder, publish):
        base = recipe.run.start_from or ""
        count = write_adapter(stored, folder, model=recipe.model, base=base)
        publish()
    _print(
        f"wrote {out}: {count:,} parameters of adapters. Export {base or 'the model'} too, and load both: "
        f"peft.PeftModel.from_pretrained(MODEL, {str(out)!r})"
    )
    return 0


def import_model(parsed: argparse.Namespace) -> int:
    named, parsed.directory = str(parsed.directory), hub.directory_of(parsed.directory)
    config = read_config(parsed.directory)
    theirs = from_config(config, where=str(parsed.directory / CONFIG))
    step = parsed.vocab_multiple
    padding = -theirs.vocab % step
    model = replace(theirs, vocab=theirs.vocab + padding, vocab_padding=padding)
    files = open_weights(parsed.directory)
    name = parsed.name or parsed.out.name
    params = lossless_format(files, model, vocab=theirs.vocab) if parsed.dtype == "keep" else parsed.dtype
    file, end_of_document = tokens.tokenizer_file(parsed.directory), tokens.end_of_document_of(parsed.directory, config)
    begin_of_document = None
    if end_of_document is not None:
        begin_of_document = tokens.begin_of_document_of(parsed.directory, end_of_document)
    imported = Imported(
        name=name,
        source=named,
        checkpoint=parsed.out / "checkpoint",
        model=model,
        params=params,
        tokenizer=parsed.out / file.name if file is not None else None,
        end_of_document=end_of_document,
        begin_of_document=begin_of_document,
        row_tokens=min(config.get("max_position_embeddings", 1024), 1024),
    )
    recipe = imported_recipe(imported)
    with new_folder(parsed.out, needed=files.nbytes) as (folder, publish):
        writing = folder / ".checkpoint.writing"
        writing.mkdir()
        with _bar(f"importing {name}", folder, files) as advance:
            converted = import_weights(files, writing, model=model, format=params, vocab=theirs.vocab, advance=advance)
        state = RunState(
            recipe=recipe_mapping(recipe),
            tokenizer=_copy_tokenizer(file, folder, end_of_document),
            lineage={
                "imported_from": named,
                "config_sha256": hashlib.sha256((parsed.directory / CONFIG).read_bytes()).hexdigest(),
                "vocab": theirs.vocab,
            },
        )
        storage.publish(writing, folder / "checkpoint", state)
        published.store(parsed.directory, folder)
        (folder / f"{name}.yaml").write_text(recipe_text(imported))
        agreement, why = _compare_as_trained(
            parsed, recipe, config, checkpoint=folder / "checkpoint", folder=parsed.directory
        )
        if agreement is not None and agreement.problems:
            return _refuse(agreement, f"{parsed.out} was not written", config=config)
        publish()
    _print(
        f"wrote {parsed.out}: {converted.parameters:,} parameters in {parsed.out}/checkpoint; the recipe is {name}.yaml:"
    )
    uses = () if model.head == "scalar" else ("generate",)
    for command in ("prepare", "train", *uses):
        _print(f"  {STRATUM} {command} --config-dir {parsed.out} -cn {name}")
    return _conclude(agreement, why, f"stratum hf check {parsed.out} {parsed.directory}")


def check_models(parsed: argparse.Namespace) -> int:
    path, manifest = _checkpoint_at(parsed.checkpoint)
    recipe = _recipe_of(manifest.recipe, path)
    config = read_config(parsed.directory)
    theirs = from_config(config, where=str(parsed.directory / CONFIG))
    differing = _different_fields(recipe.model, theirs)
    if differing:
        raise RecipeError(
            f"{parsed.directory / CONFIG} describes a different model than {path}:\n  " + "\n  ".join(differing)
        )
    files, stored = open_weights(parsed.directory), StoredTensors(path)
    vocab = theirs.vocab
    different = different_weights(stored, files, model=recipe.model, vocab=vocab)
    _print(
        f"weights: {len(files.entries) - len(different)} of {len(files.entries)} tensors hold the same numbers"
        + (f"; not {', '.join(different[:8])}{', ...' if len(different) > 8 else ''}" if different else "")
    )
    agreement = _compare(_options(parsed), recipe, checkpoint=path, folder=parsed.directory)
    if agreement.problems or different:
        problems = [*agreement.problems]
        if different:
            problems.append(f"{len(different)} tensors hold other numbers than the checkpoint, e.g. {different[0]}.")
        return _refuse(agreement, "the two are not the same model", problems=problems, config=config)
    return _conclude(agreement, "", "")


def _tokenizer_for(
    parsed: argparse.Namespace, recipe: Recipe, manifest: storage.Manifest
) -> tuple[Tokenizer, Path] | None:
    """The tokenizer to export and its file. None for weights that were imported without a tokenizer."""
    if parsed.tokenizer is not None:
        found = load_tokenizer(parsed.tokenizer, recipe.data.tokenizer), parsed.tokenizer
    else:
        try:
            found = open_tokenizer(recipe)
        except DataError as error:
            imported = published.import_of(manifest.lineage) is not None
            if imported and not manifest.tokenizer and recipe.data.tokenizer.path is None:
                _print(
                    "note: the weights were imported without a tokenizer, so none is written. --tokenizer PATH adds one."
                )
                return None
            raise RecipeError(f"{error} Or name the file: --tokenizer PATH.") from error
    tokens.check_fingerprint(found[0], manifest.tokenizer, path=found[1])
    return found


def _published_vocab(manifest: storage.Manifest, model: ModelConfig, tokenizer: Tokenizer | None) -> int | None:
    """Rows of the published embedding, if ours was padded on import and no token uses the added rows; None: as ours."""
    vocab = (published.import_of(manifest.lineage) or {}).get("vocab")
    if (
        not isinstance(vocab, int)
        or vocab >= model.real_vocab
        or (tokenizer is not None and tokenizer.vocab_size > vocab)
    ):
        return None
    return vocab


def _config_for(
    parsed: argparse.Namespace,
    recipe: Recipe,
    manifest: storage.Manifest,
    *,
    carried: Path | None,
    special: SpecialTokens,
    dtype: str,
    vocab: int | None,
) -> dict[str, Any]:
    """config.json of an export. For an imported model it is the published one, with the changes since."""
    if carried is None:
        positions = parsed.max_positions or recipe.data.row_tokens
        return to_config(recipe.model, tokens=special, max_positions=positions, dtype=dtype, vocab=vocab)
    untouched, positions = published.is_untouched(manifest), parsed.max_positions
    if positions is None and not untouched and recipe.data.row_tokens > (published.max_length_of(carried) or 0):
        positions = recipe.data.row_tokens
    return published.carried_config(
        carried,
        recipe.model,
        dtype=dtype,
        vocab=vocab or recipe.model.real_vocab,
        max_positions=positions,
        untouched=untouched,
    )


def _write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    file: Path,
    *,
    recipe: Recipe,
    carried: Path | None,
    untouched: bool,
    config: dict[str, Any],
) -> None:
    """Write the tokenizer files: the published ones if the tokenizer is the same. If the model was trained further, they add what
    the recipe adds to a text: its begin-of-document token, or nothing."""
    if not untouched and tokenizer.template_begin not in (None, recipe.data.tokenizer.begin_of_document):
        _print(
            f"note: the template of {file} puts {tokenizer.template_begin!r} before a text, but the model was trained with "
            f"data.tokenizer.begin_of_document={recipe.data.tokenizer.begin_of_document or 'null'}: the exported tokenizer "
            f"does as the training did."
        )
    if carried is not None:
        source = tokens.tokenizer_file(carried)
        same = source is not None and (
            load_tokenizer(source, recipe.data.tokenizer).fingerprint == tokenizer.fingerprint
        )
        published.restore(carried, folder, tokenizer=same)
        if same:
            # SentencePiece files have no place for a template, so transformers adds tokens by its own rules: convert them.
            if untouched:
                return
            if tokenizer.file == tokens.TOKENIZER:
                tokens.as_trained(folder, tokenizer)
                return
    try:
        tokens.write_tokenizer(folder, file, tokenizer, max_positions=config["max_position_embeddings"])
    except DataError as error:
        for name in (tokens.TOKENIZER, tokens.PIECES, tokens.CONFIG):
            (folder / name).unlink(missing_ok=True)
        _print(
            f"note: the export has no tokenizer, because transformers would give other ids than training used: {error}"
        )


def _compare_as_trained(
    parsed: argparse.Namespace,
    recipe: Recipe,
    config: dict[str, Any],
    *,
    checkpoint: Path,
    folder: Path,
    with_template: bool = False,
) -> tuple[Agreement | None, str]:
    """`_compare_unless`; if only transformers' clamp on dt makes the models differ, without the clamp, with a note."""
    agreement, why = _compare_unless(parsed, recipe, checkpoint=checkpoint, folder=folder, with_template=with_template)
    if agreement is not None and agreement.problems and clamp_of(config) and not parsed.open_clamp:
        parsed.open_clamp = True  # compare again without the clamp, as the weights were trained
        opened, _ = _compare_unless(parsed, recipe, checkpoint=checkpoint, folder=folder, with_template=with_template)
        if opened is not None and not opened.problems:
            agreement = opened
            _print(
                f"note: transformers clamps dt at time_step_min={clamp_of(config)} of {CONFIG}, which changes what this "
                f"model computes; without the clamp, as the weights were trained, the two agree."
            )
    return agreement, why


def _compare_unless(
    parsed: argparse.Namespace, recipe: Recipe, *, checkpoint: Path, folder: Path, with_template: bool = False
) -> tuple[Agreement | None, str]:
    """(comparison after a conversion, "") or (None, why not): --no-check, no transformers, or not enough memory."""
    if parsed.no_check:
        return None, "--no-check was given."
    options = _options(parsed)
    count = parameters(recipe.model).total
    needed = 2 * count * (4 if options.dtype == "fp32" else 2)
    available = psutil.virtual_memory().available
    if options.device == "cpu" and needed > 0.9 * available:
        return None, f"both models need {units.size(needed)} of memory, {units.size(available)} are free here."
    try:
        return _compare(options, recipe, checkpoint=checkpoint, folder=folder, with_template=with_template), ""
    except BackendError as error:
        return None, str(error)


def _compare(
    options: CheckOptions, recipe: Recipe, *, checkpoint: Path, folder: Path, with_template: bool = False
) -> Agreement:
    """Our model of a checkpoint next to transformers' of a directory, on real text.

    with_template: call the directory's tokenizer with its template, as any user would; it must give the ids of training.
    """
    device = choose_device(options.device)  # type: ignore[arg-type]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    theirs = load_theirs(folder, dtype=dtype, device=device, open_clamp=options.open_clamp)
    batch = _batch(options, recipe, folder, with_template=with_template).to(device)
    plain = replace(recipe, precision=PrecisionConfig(params=options.dtype))  # type: ignore[arg-type]
    with model_on_one_rank(plain, checkpoint, device=device) as ours:
        if options.quantizer is not None:
            options.quantizer.apply(ours)
        return compare(ours, theirs, batch, model=recipe.model, tolerance=options.tolerance)


def _batch(options: CheckOptions, recipe: Recipe, folder: Path, *, with_template: bool) -> torch.Tensor:
    """Rows of token ids of real text by the directory's tokenizer, [rows, row_tokens], spread evenly over the text."""
    chunk = _longest_chunk(recipe, folder)
    row_tokens = options.row_tokens or max(_ROW_TOKENS, 2 * chunk + 1)
    if row_tokens <= chunk:
        raise RecipeError(
            f"--tokens {row_tokens} is within one chunk of the scan ({chunk} tokens): the state passed between chunks would not "
            f"be compared. Use --tokens {2 * chunk + 1}."
        )
    source = SourceConfig(path=options.text, max_bytes=4_000_000)
    text = "\n".join(document.text for document in documents("check", source))
    ids = _ids(text, recipe, folder, with_template=with_template)
    wanted = options.rows * row_tokens
    if len(ids) < wanted:
        raise DataError(f"{options.text} has {len(ids):,} tokens, {wanted:,} are needed. Lower --rows or --tokens.")
    window = recipe.model.window_tokens
    if "w" in recipe.model.pattern and row_tokens <= window:
        _print(
            f"note: rows of {row_tokens:,} tokens fit into the window of {window:,}, so local and global attention "
            f"cannot be distinguished. Use --tokens {window + 256}."
        )
    gap = (len(ids) - row_tokens) // max(1, options.rows - 1) if options.rows > 1 else 0
    return torch.tensor([ids[row * gap : row * gap + row_tokens] for row in range(options.rows)])


def _longest_chunk(recipe: Recipe, folder: Path) -> int:
    """Tokens of a chunk of the scan, ours or theirs; 0 without Mamba layers."""
    theirs = read_config(folder).get("chunk_size", 0)
    return max(recipe.model.mamba_chunk, int(theirs or 0)) if "M" in recipe.model.pattern else 0


def _ids(text: str, recipe: Recipe, folder: Path, *, with_template: bool) -> list[int]:
    """Token ids of a text by the directory's tokenizer, which must give the same ids in transformers and here. Without one, by
    the run's tokenizer, or else the bytes of the text: the comparison of two models does not depend on the meaning of ids."""
    path = tokens.tokenizer_file(folder)
    if path is None or not (folder / tokens.CONFIG).is_file():
        try:
            if path is None:
                tokenizer, path = open_tokenizer(recipe)
            else:
                tokenizer = load_tokenizer(path, recipe.data.tokenizer)
        except DataError:
            _print(f"note: {folder} has no tokenizer that can be read; ids are the bytes of the text.")
            return [byte % recipe.model.real_vocab for byte in text.encode()]
        _print(f"note: {folder} has no tokenizer for transformers; ids are from {path}.")
        return tokenizer.encode(text)
    texts = [text, *tokens.ODD_TEXTS]
    theirs = their_ids(folder, texts, with_special=with_template)
    try:
        tokenizer = load_tokenizer(path, recipe.data.tokenizer)
    except DataError as error:
        _print(f"note: the tokenizer was not compared: {error}")
        return theirs[0]
    begin = [] if tokenizer.bod is None else [tokenizer.bod]
    ours = [(begin if with_template else []) + tokenizer.encode(text) for text in texts]
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a == b:
            continue
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shown = repr(texts[number][:40])
        problem = f"{folder}: transformers and this project give different token ids for {shown}, from id {place:,} on"
        if with_template or number == 0:
            raise CheckpointError(f"{problem}: {b[place : place + 4]} there, {a[place : place + 4]} here.")
        _print(f"note: {problem}. Prepared data has the ids of this project.")
        break
    if not with_template and their_ids(folder, ["a"], with_special=True)[0] != begin + tokenizer.encode("a"):
        _print(
            f"note: called on a text, the tokenizer of {folder} adds other special tokens than training rows have here "
            f"(data.tokenizer.begin_of_document={recipe.data.tokenizer.begin_of_document or 'null'}, then the text)."
        )
    return theirs[0]


def _options(parsed: argparse.Namespace) -> CheckOptions:
    return CheckOptions(
        text=parsed.text,
        rows=parsed.rows,
        row_tokens=parsed.tokens,
        dtype=parsed.check_dtype,
        device=parsed.device,
        tolerance=parsed.tolerance,
        open_clamp=parsed.open_clamp,
        quantizer=getattr(parsed, "quantizer", None),
    )


def _checkpoint_at(place: Path) -> tuple[Path, storage.Manifest]:
    """The checkpoint in a run folder, in an import folder, or the folder itself."""
    return checkpoint_at(place / "checkpoint" if (place / "checkpoint").is_dir() else place)


def _recipe_of(mapping: dict[str, object], path: Path) -> Recipe:
    if not mapping:
        raise CheckpointError(f"{path} has no recipe, so its model is not known.")
    return recipe_from_mapping(mapping)


def _different_fields(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Differing fields of the two models that affect the function. Our vocabulary may be padded."""
    family = family_of(ours)
    free = {
        "init_std",
        "vocab",
        "vocab_padding",
        "mamba_chunk",
        "window_tokens" if "w" not in ours.pattern else "",
        "query_scale",
    }
    free |= {"rope_base", "rope_scaling", "rope_factor", "rope_original_tokens"} if ours.position == "none" else set()
    if family == "nemotron_h" or ours.head == "scalar":
        free.add("tie_embeddings")  # exported as two equal matrices, or without a matrix for the head
    else:
        free |= {name for name in asdict(ours) if name.startswith("mamba_")}
    pairs = [(name, value, asdict(theirs)[name]) for name, value in asdict(ours).items() if name not in free]
    pairs.append(("query_scale", ours.query_scale or ours.head_dim, theirs.query_scale or theirs.head_dim))
    pairs = [(name, a.replace("|", "") if name == "pattern" else a, b) for name, a, b in pairs]
    found = [f"model.{name}: {a} in the checkpoint, {b} in {CONFIG}" for name, a, b in pairs if a != b]
    if ours.real_vocab < theirs.vocab:
        found.append(f"model.vocab without padding: {ours.real_vocab} in the checkpoint, {theirs.vocab} in {CONFIG}")
    return found


def _copy_tokenizer(file: Path | None, folder: Path, end_of_document: str | None) -> str:
    """Copy the tokenizer. -> its fingerprint; empty if there was none, or none that this project can read."""
    if file is None or end_of_document is None:
        _print("note: the directory has no tokenizer; set data.tokenizer in the recipe before preparing data.")
        return ""
    shutil.copyfile(file, folder / file.name)
    try:
        return load_tokenizer(folder / file.name, TokenizerConfig(end_of_document=end_of_document)).fingerprint
    except DataError as error:
        _print(f"note: {error}")
        return ""


@contextmanager
def _bar(title: str, folder: Path, source: object) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes, for large models only."""
    weights = getattr(source, "weights", None) or getattr(source, "entries", {})
    total = sum(entry.nbytes for entry in weights.values())
    with progress(title, total, is_shown=total >= _BAR_FROM_BYTES) as advance:
        yield advance


def _conclude(agreement: Agreement | None, why: str, command: str) -> int:
    if agreement is None:
        _print(f"NOT COMPARED with transformers: {why}\nCompare later with: {command}")
        return 0
    _show(agreement)
    _print("The two agree.")
    return 0


def _refuse(
    agreement: Agreement, verdict: str, *, problems: list[str] | None = None, config: dict[str, object] | None = None
) -> int:
    _show(agreement)
    sys.stdout.flush()
    sys.stderr.write(f"error: {verdict}:\n")
    for problem in agreement.problems if problems is None else problems:
        sys.stderr.write(f"  {problem}\n")
    if (config or {}).get("model_type") == "nemotron_h" and (wrong := wrong_scan()) is not None:
        sys.stderr.write(f"  {wrong}\n")
    clamp = clamp_of(config or {})
    if clamp:
        sys.stderr.write(
            f"  {CONFIG} has time_step_min={clamp}: transformers clamps dt at this value, but the published weights "
            f"were trained without a clamp. --open-clamp compares without it, and so does {NO_CLAMP} in {CONFIG}.\n"
        )
    return 1


def _show(agreement: Agreement) -> None:
    for line in [*agreement.table(), "", *agreement.summary()]:
        _print(line)


def _print(text: str) -> None:
    sys.stdout.write(printable_lines(text) + "\n")

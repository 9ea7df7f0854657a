"""Assembles a training run, in order of dependency. It is the only module that reads the whole recipe.

device -> layout -> data -> mesh -> lease of the run folder -> storage
    -> model -> DDP -> optimizer -> resume -> stream -> loop -> report
"""

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.chat.prompts import PromptSet
from data.order.left_out import left_out
from data.stream import Dataset, Stream
from data.system import disk
from recipes.schema.errors import CheckpointError, CorruptionError, DataError, NumericsError, refuse
from recipes.schema.evaluate import heldout_is_due, samples_are_due, tasks_are_due
from recipes.schema.facts import named as named_checkpoint
from recipes.schema.ledger import Ledger
from recipes.schema.pattern import parameters, trained_flops_per_token
from recipes.schema.read import recipe_mapping, recipe_yaml
from recipes.schema.recipe import Recipe
from recipes.schema.rules import start_problems
from recipes.schema.run_folder import METRICS
from recipes.schema.scaling import describe_precision, rounds_at_random
from train.align.dpo import implicit_pairs_step
from train.align.frozen_models import FrozenModels, check_frozen_models, open_frozen_models
from train.align.policy_stream import PolicyStream
from train.align.reference import Attach, open_reference, reference_of
from train.build import build_engine, check_start, mesh_of, open_material
from train.checkpoint.copying import storage_copy
from train.checkpoint.finite import remedies_of
from train.checkpoint.manager import CheckpointFolder, checkpoint_at
from train.checkpoint.manifest import RunState
from train.checkpoint.resume import TEACHER
from train.checkpoint.saving import Peers
from train.checkpoint.stream_state import read_stream_state
from train.copies.place import forget_token
from train.copies.restore import open_copies, resume_from_either
from train.distill.teacher_cache import TeacherCache
from train.engine import Engine
from train.evaluate.ask import TaskResult
from train.evaluate.depth_acceptance import depth_acceptance
from train.evaluate.heldout_preferences import heldout_preferences, recorded
from train.evaluate.losses import heldout_bits_per_byte
from train.evaluate.prompt_samples import prompt_samples
from train.evaluate.training_tasks import open_training_tasks, task_scores
from train.integrity.replay import replicas_have_all_experts
from train.integrity.watch import Integrity
from train.loop import train_loop
from train.megatron import choose_device, use_device
from train.native.kernel_versions import are_mixed, describe, of_all_ranks
from train.parallel.mesh import Mesh, world_from_environment
from train.record.machine import peak_flops
from train.record.profile import Profiler
from train.record.telemetry import Telemetry
from train.resilience.faults import check_scores
from train.resilience.hangs import hangs_named, record_operations
from train.resilience.lease import run_lease
from train.resilience.spikes import Spike, SpikeWatch, documents_of_step, ledger_after_rollback, named, spike_watch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunEnd:
    """How a run ended."""

    folder: Path
    step: int
    reason: str
    """"finished", "paused" or a signal's name."""


def train(recipe: Recipe) -> RunEnd:
    """Train a recipe to its end, resuming from its folder if possible. Every process of the world calls it.

    Raises RecipeError, DataError, BackendError, CheckpointError, NumericsError; LeaseError if another process trains in the
    run's folder. Saved checkpoints are not affected.
    """
    rank, world = world_from_environment()
    layout = check_start(recipe, world=world, rank=rank)
    device = choose_device(recipe.run.device)
    _set_threads(recipe.run.threads)
    material = open_material(recipe)
    folder = Path(recipe.run.folder) / recipe.run.name
    use_device(device)
    record_operations()
    with (
        mesh_of(recipe, layout, device=device, rank=rank) as mesh,
        hangs_named(timeout_s=recipe.launch.timeout_s),
        run_lease(folder, rank=rank, any_rank=mesh.any_rank) as check_lease,
        storage_copy(recipe, folder, mesh=mesh) as copy,
    ):
        checkpoints = CheckpointFolder(
            folder / "checkpoints", recipe.checkpoint, remedies=remedies_of(recipe), copy=copy
        )
        return _train(recipe, mesh=mesh, material=material, checkpoints=checkpoints, check_lease=check_lease)


def _train(
    recipe: Recipe,
    *,
    mesh: Mesh,
    material: Dataset | PromptSet,
    checkpoints: CheckpointFolder,
    check_lease: Callable[[], None],
) -> RunEnd:
    folder = checkpoints.folder.parent
    tokenizer = material.tokenizer
    tasks = open_training_tasks(recipe, tokenizer)
    # run.start_from is only used by a new run: a run with checkpoints continues from its own.
    initial, origin = None, {}
    if recipe.run.start_from is not None and not checkpoints.published():
        source = named_checkpoint(recipe.run.start_from)
        if source.path is None or source.manifest is None:
            raise CheckpointError(f"run.start_from: {source.error}")
        initial, before = source.path, source.manifest
        refuse(start_problems(recipe, source, tokenizer=tokenizer.fingerprint))
        origin = {name: value for name, value in before.lineage.items() if name != TEACHER}
        origin |= {"started_from": str(initial), "started_from_fingerprint": before.fingerprint}
    engine = build_engine(recipe, mesh, weights=initial, tokenizer=tokenizer.fingerprint)
    mapping = recipe_mapping(recipe)
    frozen = FrozenModels()
    if isinstance(material, PromptSet):
        frozen = open_frozen_models(recipe, mesh=mesh, tokenizer=tokenizer.fingerprint, eod=tokenizer.eod)
    kernels = _kernels(mesh)
    copies = open_copies(recipe.run.memory_copies, mesh, folder)
    new = RunState(
        recipe=mapping,
        data_hash=material.manifest_hash,
        tokenizer=tokenizer.fingerprint,
        kernels=kernels,
        lineage=origin,
    )
    load_started = time.perf_counter()
    start, used = resume_from_either(copies, checkpoints, engine, recipe=recipe, new=new)
    step, position = start.state.step, start.state.position
    if step > 0:
        check_frozen_models(frozen, recipe, before=start.state.lineage)
    start = replace(start, state=replace(start.state, lineage=start.state.lineage | frozen.lineage))
    if mesh.rank == 0:
        _warn_if_start_changed(recipe, start.state.lineage)
        if isinstance(material, Dataset):
            _check_teacher_cache(recipe, material, position)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "recipe.yaml").exists():  # it makes the folder a run's
            disk.write_text(folder / "recipe.yaml", recipe_yaml(mapping))
    mesh.barrier()
    reference: Attach | None = None
    if recipe.objective.kind == "dpo" and isinstance(material, Dataset):
        weights = reference_of(recipe, start.state.lineage, step=step, tokenizer=tokenizer.fingerprint)
        reference = open_reference(
            recipe, engine, material, weights, folder=folder, is_new=step == 0 and not checkpoints.published()
        )
        engine = replace(engine, prepare=reference)

    with ExitStack() as stack:
        telemetry = Telemetry(
            folder,
            recipe.telemetry,
            is_writer=mesh.rank == 0,
            reduce=mesh.sum_over_world,
            device=mesh.device,
            total_steps=recipe.run.steps,
            first_step=step,
            tokens_per_step=recipe.run.global_rows * recipe.data.row_tokens,
            flops_per_token=trained_flops_per_token(recipe.model, recipe.data.row_tokens),
            peak_flops=_world_peak(peak_flops(mesh.device), mesh),
            recipe_dict=mapping,
            data_hash=material.manifest_hash,
            loss_parts=engine.loss_parts,
            kernels=kernels,
            precision_at=lambda tokens: describe_precision(recipe.model, recipe.precision, tokens=tokens),
            waits_for_space=recipe.checkpoint.on_failure == "continue",
            load_s=time.perf_counter() - load_started,
        )
        stack.callback(telemetry.close)
        stream: Stream | PolicyStream
        spikes = spike_watch(recipe.run.spikes, start.state.ledger)
        if isinstance(material, PromptSet):
            stream = PolicyStream(
                recipe,
                engine=engine,
                prompts=material,
                frozen=frozen,
                telemetry=telemetry,
                folder=folder,
                start=start.state,
                state=read_stream_state(start.path) if start.path is not None else start.stream,
                oldest_step=checkpoints.oldest_step,
            )
        else:
            material = material.without(left_out(start.state.ledger.left_out))
            stream = _stream_of_rows(recipe, material, mesh=mesh, position=position)
        stack.enter_context(stream)

        def evaluate(at: int) -> None:
            if isinstance(material, Dataset) and heldout_is_due(recipe.evaluate, at, steps=recipe.run.steps):
                rows = recipe.evaluate.rows_per_source
                with telemetry.phase("evaluating"):
                    if recipe.data.preferences:
                        found = _heldout_preferences(recipe, engine, material, reference)
                        telemetry.event("tasks", step=at, tasks=recorded(found))
                        scores, measure = {one.name: one.metrics["loss"].value for one in found}, "losses"
                    else:
                        scores, measure = heldout_bits_per_byte(engine, material, rows_per_source=rows), "bits per byte"
                        telemetry.evaluation(at, scores)
                        if depths := recipe.model.mtp.depths:
                            found = depth_acceptance(engine, material, depths=depths, rows_per_source=rows)
                            telemetry.event("tasks", step=at, tasks=recorded(found))
                check_scores(at, scores, measure=measure, advice=lambda: checkpoints.advice(mesh))
            if tasks_are_due(recipe.evaluate, at, steps=recipe.run.steps):
                with telemetry.phase("scoring tasks"):
                    results = task_scores(engine, tasks, tokenizer, shape=recipe.model)
                telemetry.event("tasks", step=at, tasks=results)
            if samples_are_due(recipe.evaluate, at, steps=recipe.run.steps):
                with telemetry.phase("writing samples"):
                    texts = prompt_samples(recipe, engine, tokenizer=tokenizer)
                telemetry.event("samples", step=at, samples=texts)

        def state_at(at: int, rows: int) -> RunState:
            state = replace(start.state, step=at, position=rows, tokens=stream.tokens)
            return state if spikes is None else replace(state, ledger=spikes.ledger)

        def save(at: int, rows: int, *, background: bool) -> None:
            check_lease()
            with telemetry.phase("staging" if background else "saving"):
                checkpoints.request(engine, state_at(at, rows), stream=stream.state(), background=background)

        def copy(at: int, rows: int) -> None:
            assert copies is not None, "called only if copies are due"
            copies.request(engine, state_at(at, rows), stream=stream.state())

        def report(skipped: Spike) -> None:
            text = f"step {skipped.step} is skipped: {skipped.reason}"
            _record_spike(telemetry, "skip", skipped, text, recipe=recipe, material=material, mesh=mesh)

        if copies is not None:
            warning = copies.prepare(engine, state_at(step, position), stream=stream.state(), used=used)
            if warning is not None:
                telemetry.event("warning", text=warning)
            stack.callback(copies.close)
        stack.callback(checkpoints.close)
        profiler = Profiler(recipe.run, folder=folder, chunks=engine.chunks, rank=mesh.rank, device=mesh.device)
        stack.callback(profiler.close)
        if mesh.rank == 0:  # after all that may refuse: a start that fails leaves the recipe of a run as it was
            disk.write_text(folder / "recipe.yaml", recipe_yaml(mapping))
        if start.text:
            telemetry.event("audit", step=step, text=start.text)
        telemetry.event(
            "resume" if step else "start",
            step=step,
            total_steps=recipe.run.steps,
            parameters=parameters(recipe.model).total,
            layout=mesh.layout.describe(),
            world=mesh.layout.world,
            device=str(mesh.device),
            kernels=kernels,
            precision=describe_precision(recipe.model, recipe.precision),
        )
        integrity = _integrity(recipe, engine, telemetry=telemetry, folder=folder, kernels=kernels, material=material)
        if step == 0:
            evaluate(0)
        if recipe.run.spikes.policy == "rollback" and not mesh.any_rank(bool(checkpoints.published())):
            save(step, position, background=False)  # a spike before the first checkpoint goes back to here
            checkpoints.check(always=True)
        started_at, received = step, None
        try:
            while True:
                end = train_loop(
                    recipe,
                    engine=engine,
                    stream=stream,
                    telemetry=telemetry,
                    first_step=step,
                    evaluate=evaluate,
                    checkpoints=checkpoints,
                    save=save,
                    report=report,
                    profiler=profiler,
                    copies=copies,
                    copy=copy,
                    spikes=spikes,
                    integrity=integrity,
                    received=received,
                    started_at=started_at,
                )
                if end.spike is None:
                    break
                assert spikes is not None and isinstance(material, Dataset) and isinstance(stream, Stream), (
                    "checked by the rules"
                )
                stream.close()
                if copies is not None:
                    copies.discard()
                with telemetry.phase("going back"):
                    saved, ledger = _go_back(
                        end.spike, recipe=recipe, engine=engine, checkpoints=checkpoints, now=spikes.ledger
                    )
                text = (
                    f"step {end.spike.step} is undone: {end.spike.reason}. The run goes back to step {saved.step} and leaves "
                    f"{_rows_of(ledger) - _rows_of(spikes.ledger)} rows out"
                )
                _record_spike(
                    telemetry, "rollback", end.spike, text, recipe=recipe, material=material, mesh=mesh, to_step=saved.step,
                    left_out=[list(pair) for pair in ledger.left_out],
                )  # fmt: skip
                material = material.without(left_out(ledger.left_out))
                material.blend.check_length(
                    recipe.run.steps * recipe.run.global_rows, global_rows=recipe.run.global_rows
                )
                step, spikes, received = saved.step, SpikeWatch(recipe.run.spikes, ledger), end.received
                stream = _stream_of_rows(recipe, material, mesh=mesh, position=saved.position)
                stack.enter_context(stream)
                integrity = _integrity(
                    recipe, engine, telemetry=telemetry, folder=folder, kernels=kernels, material=material
                )
        except (NumericsError, CorruptionError):
            if copies is not None:
                copies.close()  # a copy that ends after the deletion would publish itself
                copies.delete()  # the next start must go back to a checkpoint, as the error says
            raise
        if copies is not None:
            telemetry.event("memory_copies", step=end.step, count=copies.made, stall_s=copies.stall_s)
            if copies.end(end.step) and mesh.rank == 0:
                forget_token(folder)
    return RunEnd(folder=folder, step=end.step, reason=end.reason)


def _integrity(
    recipe: Recipe, engine: Engine, *, telemetry: Telemetry, folder: Path, kernels: str, material: Dataset | PromptSet
) -> Integrity | None:
    """The checks for corrupted numbers that the recipe asks for; None if it asks for none."""
    config = recipe.run.integrity
    if not config.enabled:
        return None
    reason = None
    if rounds_at_random(recipe.precision):
        reason = "round at random, each with its own seed"
    elif are_mixed(kernels):
        reason = "run different kernels"
    elif not replicas_have_all_experts(engine.mesh.layout):
        reason = "of different data-parallel replicas have different experts (parallel.expert)"
    if reason is not None and engine.mesh.rank == 0:
        log.warning("ranks %s: run.integrity replays steps on their own rank only.", reason)
    return Integrity(
        config,
        engine,
        telemetry=telemetry,
        folder=folder,
        seed=recipe.run.seed,
        rows=material.training_rows if isinstance(material, Dataset) else None,
        compares_ranks=reason is None,
    )


def _go_back(
    found: Spike, *, recipe: Recipe, engine: Engine, checkpoints: CheckpointFolder, now: Ledger
) -> tuple[RunState, Ledger]:
    """Fill the engine from the newest checkpoint. -> its state, and the ledger to continue with. Collective over the world.

    NumericsError after run.spikes.most_rollbacks; CheckpointError if no checkpoint can be loaded.
    """
    checkpoints.wait()
    spikes, rows = recipe.run.spikes, recipe.run.global_rows
    ledger_after_rollback(
        found, spikes, now=now, saved=now, saved_step=0, global_rows=rows
    )  # too many: stop before loading
    loaded = checkpoints.resume(engine)
    if loaded is None:
        raise CheckpointError(
            f"{checkpoints.folder} has no checkpoint to go back to from the spike at step {found.step}."
        )
    saved = loaded.manifest
    ledger = ledger_after_rollback(found, spikes, now=now, saved=saved.ledger, saved_step=saved.step, global_rows=rows)
    return saved, ledger


def _record_spike(
    telemetry: Telemetry, kind: str, found: Spike, text: str, *, recipe: Recipe, material: Dataset | PromptSet, mesh: Mesh,
    **more: Any,
) -> None:  # fmt: skip
    """Record a spike with the documents of its step, and warn. Only rank 0 reads them."""
    documents: list[dict[str, object]] = []
    count = 0
    if mesh.rank == 0 and isinstance(material, Dataset):
        try:
            documents, count = documents_of_step(material, found.step, global_rows=recipe.run.global_rows)
            text += f". Its documents: {named(documents, count)}. `{kind}` in {METRICS} has their text"
        except (DataError, OSError) as error:
            text += f". Its documents cannot be read: {error}"
    telemetry.event(
        kind, step=found.step, reason=found.reason, loss=found.loss, grad_norm=found.grad_norm, documents=documents,
        documents_in_step=count, **more,
    )  # fmt: skip
    telemetry.event("warning", text=text + ".")


def _rows_of(ledger: Ledger) -> int:
    return left_out(ledger.left_out).rows


def _heldout_preferences(
    recipe: Recipe, engine: Engine, dataset: Dataset, reference: Attach | None
) -> list[TaskResult]:
    rows = recipe.evaluate.rows_per_source
    if reference is None:
        return heldout_preferences(engine, dataset, rows_per_source=rows)
    return heldout_preferences(
        engine,
        dataset,
        rows_per_source=rows,
        pairs_step=implicit_pairs_step(engine.mesh, recipe.objective.dpo),
        prepare=lambda batches: reference(batches, is_heldout=True),
    )


def _stream_of_rows(recipe: Recipe, dataset: Dataset, *, mesh: Mesh, position: int) -> Stream:
    return Stream(
        dataset,
        position=position,
        global_rows=recipe.run.global_rows,
        microbatch_rows=recipe.run.microbatch_rows,
        rank=mesh.data_rank,
        ranks=mesh.layout.data,
        prefetch_steps=recipe.data.prefetch_steps,
        pin=mesh.device.type == "cuda",
        threads=recipe.data.read_threads,
        stall_warning_s=recipe.data.stall_warning_s,
        stall_limit_s=recipe.data.stall_limit_s,
    )


def _check_teacher_cache(recipe: Recipe, dataset: Dataset, position: int) -> None:
    """Raise DataError if the teacher cache lacks rows of the next or the last step: the run would fail when it reaches them."""
    objective, size = recipe.objective, recipe.run.global_rows
    end = recipe.run.steps * size
    if objective.kind != "distill" or objective.teacher_cache is None or position >= end:
        return
    cache = TeacherCache(Path(objective.teacher_cache))
    for first in (position, max(position, end - size)):
        cache.check_rows(dataset.training_rows(np.arange(first, min(first + size, end))))


def _warn_if_start_changed(recipe: Recipe, lineage: dict[str, Any]) -> None:
    """Warn if run.start_from has changed since the run began, because a resumed run does not read it again."""
    original = lineage.get("started_from_fingerprint")
    if original is None or recipe.run.start_from is None:
        return
    try:
        path, manifest = checkpoint_at(recipe.run.start_from)
    except CheckpointError:
        return  # a resumed run does not need it, so it may have been deleted
    if manifest.fingerprint != original:
        log.warning(
            "run.start_from=%s is now %s with weights %s. This run started from %s with weights %s and continues with its own "
            "checkpoints. To start from the new weights, choose another run.name.",
            recipe.run.start_from,
            path,
            manifest.fingerprint[:12],
            lineage["started_from"],
            original[:12],
        )


def _kernels(mesh: Mesh) -> str:
    """Which CPU kernels each rank runs; warns if ranks differ. Collective."""
    peers = Peers(mesh.saving)
    kernels = peers.gather(describe(mesh.device))
    if kernels is not None and len(set(kernels)) > 1:
        log.warning("ranks run different kernels, so results depend on the order of ranks: %s", of_all_ranks(kernels))
    return str(peers.broadcast(of_all_ranks(kernels) if kernels is not None else None))


def _world_peak(per_rank: float | None, mesh: Mesh) -> float | None:
    """Peak of all devices together. Each CPU rank has measured its own threads only."""
    return None if per_rank is None else per_rank * mesh.layout.world


def _set_threads(threads: int) -> None:
    """run.threads, or what OMP_NUM_THREADS says, or this process's share of the cores. The 1 that torchrun sets by itself cannot
    be told from a user's, so under torchrun 1 does not count."""
    variable = os.environ.get("OMP_NUM_THREADS", "")
    if not threads and variable and not ("TORCHELASTIC_RUN_ID" in os.environ and variable == "1"):
        # torch reads the variable when it is imported, which a forked rank (launch.local.warm_process) did with another value.
        first = variable.split(",")[0].strip()
        if first.isdecimal() and int(first) > 0:
            torch.set_num_threads(int(first))
        return
    cores = len(os.sched_getaffinity(0))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, cores // local))

"""Problems of a recipe on a kind of GPU, and warnings about what is allowed but costly. Each has value, place and remedy.

All rules are in `recipes.schema.rules`, which the trainer uses too. This file collects the facts that the rules need (the kind
of GPU, this disk) and adds the planner's warnings.
"""

from dataclasses import dataclass

from launch.facts import fp32_block_scales_of, prepared_of
from launch.plan.cost.device import Device
from recipes.schema.credentials import without_credentials
from recipes.schema.errors import Problem
from recipes.schema.facts import Disk, Machine, Prepared, read_disk
from recipes.schema.launch_rules import script_problems
from recipes.schema.layout import Layout
from recipes.schema.recipe import Recipe
from recipes.schema.rules import notes, problems


@dataclass(frozen=True)
class Facts:
    """Facts that the rules need in addition to the recipe."""

    machine: Machine
    disk: Disk
    prepared: Prepared | None
    """None for data behind a URL."""

    @property
    def is_here(self) -> bool:
        """Whether the run's data is on this disk. If not, the run's other files may be on another disk too."""
        return self.prepared is not None and self.prepared.is_here


def facts_of(recipe: Recipe, device: Device) -> Facts:
    """Facts about the planned machine, which has all packages of the `gpu` extra, and about this disk."""
    machine = Machine(
        has_gpu=True,
        name=device.name,
        generation=device.generation,
        has_fp8="fp8" in device.peak,
        fp32_block_scales=fp32_block_scales_of(recipe),
    )
    return Facts(machine=machine, disk=read_disk(recipe), prepared=prepared_of(recipe))


def recipe_problems(recipe: Recipe, facts: Facts, *, world: int) -> list[Problem]:
    """All problems that would stop the run, except too little memory."""
    return problems(
        recipe,
        world=world,
        machine=facts.machine,
        disk=facts.disk,
        prepared=facts.prepared,
        here=facts.is_here,
    )


def recipe_warnings(recipe: Recipe, layout: Layout, device: Device, facts: Facts) -> list[str]:
    """Warnings about settings that are allowed but probably not intended."""
    found = []
    if layout.tensor > device.domain:
        found.append(
            f"parallel.tensor={layout.tensor} is larger than the {device.domain} GPUs that {device.name} links directly, so "
            f"every layer waits for the network. Use at most {device.domain}, with parallel.pipeline for the rest."
        )
    if layout.tensor > 1 and not recipe.parallel.sequence:
        found.append(
            "parallel.sequence=false: every tensor rank stores all norms and residuals. parallel.sequence=true needs less "
            "memory at the same traffic."
        )
    if layout.pipeline > 1 and layout.microbatches_per_step < layout.pipeline:
        found.append(
            f"a step has {layout.microbatches_per_step} microbatches for {layout.pipeline} pipeline stages, so most stages wait. "
            f"Raise run.global_rows, or lower run.microbatch_rows or parallel.pipeline."
        )
    if layout.data > 1 and not recipe.parallel.overlap_grad_reduce:
        found.append(
            "parallel.overlap_grad_reduce=false: gradients are reduced after the backward pass instead of during it."
        )
    found += [str(note) for note in notes(recipe, machine=facts.machine, prepared=facts.prepared)]
    found += [f"`stratum launch slurm` would refuse: {problem}" for problem in script_problems(recipe)]
    if recipe.run.device == "cpu":
        found.append("run.device=cpu: the plan is for GPUs, but this recipe will not use them.")
    if recipe.run.deterministic:
        found.append(
            "run.deterministic=true: some deterministic kernels are slower. By how much was not measured on a GPU."
        )
    if not facts.is_here and recipe.objective.kind == "grpo":
        found.append(
            f"objective.grpo.prompts={', '.join(recipe.objective.grpo.prompts)} or their tokenizer are not here: they, and other "
            f"files that the recipe names, were not checked."
        )
    elif not facts.is_here:
        found.append(
            f"data.folder={without_credentials(recipe.data.folder)} has no prepared data here: its vocabulary and size, and "
            f"other files that the recipe names, were not checked. Run `stratum prepare` to prepare it."
        )
    return [without_credentials(text) for text in found]

"""Recipes for tests of Kubernetes' manifests."""

from dataclasses import replace
from typing import Any

from recipes_composed import composed

from recipes.schema.launch import KubernetesConfig, LaunchConfig
from recipes.schema.read import recipe_from_mapping
from recipes.schema.recipe import Recipe

FULL = KubernetesConfig(
    image="registry/stratum:1", namespace="team", volume_claim="runs", secrets="aws-keys wandb", service_account="trainer",
    node_selector="gpu/kind=h100", tolerations="nvidia.com/gpu:NoSchedule team=a:NoExecute", cpus=32, memory_gib=100,
    queue="large", priority_class="high", topology="rack",
)  # fmt: skip


def recipe_for(kubernetes: KubernetesConfig = FULL, **launch: Any) -> Recipe:
    fields = {"nodes": 2, "gpus_per_node": 8, "grace_s": 300.0, "restarts": 5} | launch
    recipe = recipe_from_mapping(composed("-cn", "smoke"))
    return replace(
        recipe, run=replace(recipe.run, name="My run/1"), launch=LaunchConfig(kubernetes=kubernetes, **fields)
    )


def recipes() -> list[Recipe]:
    """A recipe that sets every field, and one that sets as few as possible."""
    return [recipe_for(), recipe_for(KubernetesConfig(image="i"), nodes=1, gpus_per_node=0)]

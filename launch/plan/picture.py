"""The picture of a plan: memory of each pipeline stage as stacked bars with the device's limit; time of a step by part."""

from pathlib import Path

from data.system.figure import canvas
from launch.plan.part_names import MEMORY_NAMES, PART_NAMES
from launch.plan.planner import Plan
from recipes.schema.units import GIB

_COLORS = (
    "#1f5fa8",
    "#4a90d9",
    "#7fb3e6",
    "#b5d3f0",
    "#2a9d8f",
    "#e9a23b",
    "#f2c879",
    "#c77dba",
    "#8a5a9e",
    "#d98c8c",
    "#b9b9b9",
)


def draw(plan: Plan, path: Path) -> None:
    """Write the picture. Raises RecipeError, like `canvas`."""
    with canvas(path, size=(13, 5.2)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        places = [str(memory.stage) for memory in plan.memory]
        bottom = [0.0] * len(places)
        for (part, name), color in zip(MEMORY_NAMES.items(), _COLORS, strict=True):
            sizes = [getattr(memory, part) / GIB for memory in plan.memory]
            if max(sizes) > 0:
                left.bar(places, sizes, bottom=bottom, label=name, color=color, width=0.7)
            bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
        capacity = plan.device.memory_gib
        left.axhline(capacity, color="#b02a30", linewidth=1.4)
        left.annotate(
            f"{plan.device.name}: {capacity:.0f} GiB", (1, capacity), xycoords=("axes fraction", "data"), ha="right",
            va="bottom", color="#b02a30",
        )  # fmt: skip
        left.set_xlim(-0.6, max(1.0, len(places) - 0.4))
        left.set_ylim(0, max(capacity, *bottom) * 1.1)
        left.set_xlabel("pipeline stage")
        left.set_ylabel("GiB of the fullest rank")
        left.set_title("Memory")
        left.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, reverse=True)

        parts = [(PART_NAMES[name], s) for name, s in plan.time.parts.items() if s > 0.003 * plan.time.seconds]
        parts.sort(key=lambda item: item[1])
        right.barh([name for name, _ in parts], [1e3 * s for _, s in parts], color=_COLORS[1])
        for place, (_, seconds) in enumerate(parts):
            right.annotate(
                f"{seconds / plan.time.seconds:.0%}", (1e3 * seconds, place), xytext=(4, 0), textcoords="offset points",
                va="center",
            )  # fmt: skip
        right.set_xlabel("ms")
        right.set_title(f"Time of a step: {_seconds(plan.time.seconds)}")
        right.margins(x=0.14)
        figure.suptitle(
            f"{plan.recipe.run.name}: {plan.parameters / 1e9:.2f} billion parameters on {plan.layout.world:,} x "
            f"{plan.device.name}, {plan.layout.describe()}, {plan.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, MFU {plan.mfu:.1%}"
        )


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"

"""The picture of `stratum validate`: predicted against published tokens/s per GPU, a mark per row, fitted rows hollow."""

from collections.abc import Sequence
from pathlib import Path

from data.system.figure import canvas
from launch.plan.published.validate import Line

_COLORS = {
    "ampere": "#4a90d9",
    "hopper": "#2a9d8f",
    "blackwell": "#e9a23b",
    "blackwell_ultra": "#c0504d",
    "ada": "#8e6bbf",
}
_MARKS = {None: "o", "fp8": "s", "fp4": "^"}


def draw(lines: Sequence[Line], path: Path) -> None:
    """Write the scatter plot of the lines in scope. Raises RecipeError, like `canvas`."""
    with canvas(path, size=(7.5, 7)) as figure:
        axis = figure.subplots()
        known = [line for line in lines if line.found is not None]
        ends = [value for line in known if line.found for value in (line.tokens_per_s, line.found.tokens_per_s)]
        low, high = min(ends) * 0.7, max(ends) * 1.4
        axis.fill_between(
            [low, high], [low * 0.85, high * 0.85], [low / 0.85, high / 0.85], color="#eeeeee", label="±15 %"
        )
        axis.plot([low, high], [low, high], color="#888888", linewidth=0.8)
        seen = set()
        for line in known:
            assert line.found is not None
            setting = line.found.setting
            color, mark = _COLORS[setting.device.generation], _MARKS[setting.low if setting.low in _MARKS else None]
            label = f"{setting.device.generation.replace('_', ' ')} {setting.low or 'bf16'}"
            axis.plot(
                line.found.tokens_per_s, line.tokens_per_s, mark, color=color, markersize=5, alpha=0.75,
                markerfacecolor="none" if line.is_fit else color, label=None if label in seen or line.is_fit else label,
            )  # fmt: skip
            if not line.is_fit:
                seen.add(label)
        axis.plot([], [], "o", color="#555555", markerfacecolor="none", label="fitted")
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        axis.set_xlabel("published tokens/s per GPU")
        axis.set_ylabel("predicted tokens/s per GPU")
        axis.legend(frameon=False, loc="lower right")

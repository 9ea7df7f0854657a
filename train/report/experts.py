"""A section of summary.md about the routers of expert layers, made from the lines of kind "experts" of metrics.jsonl."""

from typing import Any

from recipes.schema.run_folder import as_number

Line = dict[str, Any]
_NUMBERS = ("load_max", "load_min", "entropy", "dropped", "bias_min", "bias_max")


def is_reading(line: Line) -> bool:
    """Whether a line has the fields of a reading. The file may be damaged or come from another program."""
    layers = line.get("layers")
    if type(line.get("step")) is not int or not isinstance(layers, list) or not layers:
        return False
    return all(
        isinstance(layer, dict)
        and type(layer.get("layer")) is int
        and all(type(layer.get(name)) in (int, float) for name in _NUMBERS)
        for layer in layers
    )


def experts_section(line: Line) -> list[str]:
    """Markdown lines: each expert layer at the last reading."""
    return [
        "",
        "## Experts",
        "",
        f"Up to step {line['step']:,}, since the reading before. Loads are multiples of the mean load of a layer's experts; "
        f"entropy is a share of the largest possible.",
        "",
        "| layer | busiest expert | least busy | entropy | dropped | bias |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['layer']} | {as_number(r['load_max']):.2f} | {as_number(r['load_min']):.2f} | {as_number(r['entropy']):.3f} | "
            f"{as_number(r['dropped']):.2%} | {as_number(r['bias_min']):+.3f} to {as_number(r['bias_max']):+.3f} |"
            for r in line["layers"]
        ),
    ]

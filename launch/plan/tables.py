"""Prints a plan, or the result of a search, as tables."""

import shutil

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.system.console import open_console, print_table
from launch.plan.part_names import MEMORY_NAMES, PART_NAMES
from launch.plan.planner import USABLE, Plan
from launch.plan.search import SearchResult
from recipes.schema import units
from recipes.schema.foreign import printable, printable_lines
from recipes.schema.layout import rank_coordinates
from recipes.schema.recipe import Recipe
from recipes.schema.scaling import describe_precision


def show(plan: Plan, *, every_rank: bool = False) -> None:
    """Print a plan."""
    out, recipe = console(), plan.recipe
    for part in (
        _head(plan),
        _ranks(plan, every_rank=every_rank),
        _memory(plan),
        _work(plan),
        _time(plan),
        _cost(plan),
        *([_decode(plan)] if recipe.model.head == "vocabulary" else []),
    ):
        print_table(out, part) if isinstance(part, Table) else out.print(part)
        out.print()
    _print_problems(out, plan)


def console() -> Console:
    """A console as wide as the terminal, up to a width that is easy to read."""
    return open_console(wraps=True, width=min(140, shutil.get_terminal_size((130, 40)).columns))


def _head(plan: Plan) -> Text:
    recipe, layout = plan.recipe, plan.layout
    text = Text()
    text.append(printable(recipe.run.name), style="bold")
    text.append(f": {plan.parameters:,} parameters{_active(plan)}, ")
    text.append(
        f"{len(''.join(plan.stages))} layers, rows of {recipe.data.row_tokens:,} tokens, "
        f"{recipe.run.global_rows:,} rows a step\n"
    )
    text.append(
        f"{layout.world:,} x {plan.device.name} ({plan.device.memory_gib:.0f} GiB), {layout.describe()}, "
        f"{recipe.run.microbatch_rows} row{'s' * (recipe.run.microbatch_rows > 1)} x {layout.microbatches_per_step} "
        f"microbatches, {describe_precision(recipe.model, recipe.precision)}, recompute {recipe.parallel.recompute}"
    )
    return text


def _active(plan: Plan) -> str:
    return f" ({plan.active_parameters:,} active)" if plan.active_parameters < plan.parameters else ""


def _ranks(plan: Plan, *, every_rank: bool) -> Table:
    layout = plan.layout
    table = Table(title="Ranks", title_justify="left", title_style="bold")
    for name in ("rank", "tensor", "context", "data", "pipeline", "layers"):
        table.add_column(name, justify="left" if name == "layers" else "right", overflow="fold")
    shown = list(range(layout.world))
    if not every_rank and layout.world > 12:
        per_stage = layout.world // layout.pipeline
        firsts = [stage * per_stage for stage in range(layout.pipeline)]
        shown = sorted({0, 1, 2, *firsts[:8], layout.world - 1})
    last = -1
    for rank in shown:
        if rank > last + 1:
            table.add_row("...", "", "", "", "", "")
        at = rank_coordinates(layout, rank)
        layers = " ... ".join(plan.stages[at.pipeline :: layout.pipeline])
        table.add_row(*map(str, (rank, at.tensor, at.context, at.data, at.pipeline)), layers)
        last = rank
    return table


def _memory(plan: Plan) -> Table:
    capacity = plan.device.memory_gib
    table = Table(title="Memory of the fullest rank of each stage, GiB", title_justify="left", title_style="bold")
    shown = {
        part: name
        for part, name in MEMORY_NAMES.items()
        if part not in ("teacher", "answers") or getattr(plan.memory[-1], part)
    }
    for name in ("stage", "in flight", *shown.values(), "total", f"of {capacity:.0f}"):
        table.add_column(name, justify="right")
    for memory in plan.memory:
        share = memory.total / units.GIB / capacity
        style = "red" if share > USABLE else "yellow" if share > 0.9 else ""
        table.add_row(
            str(memory.stage),
            str(memory.in_flight),
            *[_gib(getattr(memory, part)) for part in shown],
            Text(_gib(memory.total), style=f"bold {style}"),
            Text(f"{share:.0%}", style=style),
        )
    return table


def _work(plan: Plan) -> Table:
    table = Table(title="One step, per GPU: computation and data movement", title_justify="left", title_style="bold")
    for name in ("part", "TFLOP", "share", "GB in memory", "GB sent"):
        table.add_column(name, justify="left" if name == "part" else "right")
    parts = {name: part for name, part in plan.traffic.parts.items() if part.flops}
    total = sum(part.flops for part in parts.values())
    for name, part in parts.items():
        moved = f"{part.memory_bytes / 1e9:,.1f}" if part.memory_bytes else "fused"
        table.add_row(name, f"{part.flops / 1e12:,.3f}", f"{part.flops / total:.1%}", moved, "")
    for axis, sent in plan.traffic.wire_bytes.items():
        if sent:
            table.add_row(f"{axis} parallel", "", "", "", f"{sent / 1e9:,.2f}")
    return table


def _decode(plan: Plan) -> Table:
    table = Table(title=f"Generation on one {plan.device.name}, bf16", title_justify="left", title_style="bold")
    for name in ("context", "texts", "GiB", "tokens/s", "tokens/s of a text"):
        table.add_column(name, justify="right")
    for speed in plan.decode:
        table.add_row(
            f"{speed.context_tokens:,}", f"{speed.batch:,}", _gib(speed.memory_bytes), f"{speed.tokens_per_s:,.0f}",
            f"{speed.tokens_per_s / speed.batch:,.1f}",
        )  # fmt: skip
    if not plan.decode:
        table.add_row("", "0", "", "", "")
        table.caption = "Its weights and one text do not fit one GPU."
    return table


def _time(plan: Plan) -> Table:
    table = Table(title="Where the time of a step goes", title_justify="left", title_style="bold")
    for name in ("part", "s", "share", ""):
        table.add_column(name, justify="left" if name in ("part", "") else "right")
    parts = [(name, seconds) for name, seconds in plan.time.parts.items() if seconds > 0.0005 * plan.time.seconds]
    for name, seconds in sorted(parts, key=lambda item: -item[1]):
        share = seconds / plan.time.seconds
        table.add_row(PART_NAMES[name], f"{seconds:.4g}", f"{share:.1%}", "█" * round(40 * share))
    return table


def _cost(plan: Plan) -> Table:
    table = Table(title="Cost of the run", title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    saved = plan.checkpoints
    total_tokens = plan.tokens_per_step * plan.recipe.run.steps
    tflops = plan.flops.total * plan.tokens_per_s_per_gpu / 1e12
    for name, value in (
        ("time of a step", f"{plan.time.seconds:.4g} s"),
        ("tokens/s per GPU", f"{plan.tokens_per_s_per_gpu:,.0f}"),
        ("model TFLOP/s per GPU", f"{tflops:,.1f}"),
        (
            f"MFU of {plan.peak / 1e12:,.0f} TFLOP/s, without the masked half of attention (this project, NVIDIA)",
            f"{plan.mfu:.1%}",
        ),
        ("MFU, with the masked half (torchtitan, llm-foundry)", f"{plan.mfu_unmasked:.1%}"),
        (f"{plan.recipe.run.steps:,} steps, {total_tokens / 1e9:,.3f} billion tokens", units.span(3600 * plan.hours)),
        ("GPU-hours", f"{plan.gpu_hours:,.1f}"),
        ("energy at full power, with host, without cooling", f"{plan.energy_mwh:,.3f} MWh"),
        ("a checkpoint", units.size(saved.size_bytes)),
        ("saving it: training waits / until written", f"{saved.stall_s:.2g} s / {saved.write_s:.2g} s"),
        *_copies(plan),
    ):
        table.add_row(name, value)
    return table


def _copies(plan: Plan) -> list[tuple[str, str]]:
    """The row about copies in memory; none without them."""
    if plan.copies is None:
        return []
    folder = plan.recipe.run.memory_copies.folder
    value = f"{units.gib(plan.copies.rank_bytes)} / {units.gib(plan.copies.node_bytes)}"
    return [(f"copies in memory: one of a rank / needed in {printable(folder)} of a node", value)]


def _print_problems(out: Console, plan: Plan) -> None:
    for problem in plan.problems:
        out.print(Text("problem: ", style="bold red") + Text(printable_lines(problem)))
    for warning in plan.warnings:
        out.print(Text("warning: ", style="yellow") + Text(printable_lines(warning)))
    if plan.problems:
        out.print(f"\nThis run would fail: {len(plan.problems)} problem{'s' * (len(plan.problems) > 1)}.")
    else:
        out.print("\nThis run can start. Times are predictions: docs/plan.md says how accurate they are.")


def show_search(found: SearchResult, recipe: Recipe, *, limit: str) -> None:
    """Print the best layouts of a search, and the field that limits them (`launch.plan.search.limiting_field`)."""
    out = console()
    if not found.best:
        out.print(f"None of {found.tried:,} layouts works:")
    else:
        first = found.best[0].plan
        head = Text(printable(recipe.run.name), style="bold")
        head.append(
            f": {first.parameters:,} parameters on {first.layout.world:,} x {first.device.name}; {found.tried:,} layouts "
            f"tried, {found.fitting:,} work. The best:",
            style="not bold",
        )
        out.print(head)
        table = Table(show_lines=True)
        for name in ("", "layout", "rows", "recompute", "s/step", "tokens/s/GPU", "MFU", "GiB", "why"):
            table.add_column(
                name, justify="left" if name in ("layout", "why", "recompute") else "right", overflow="fold"
            )
        for number, candidate in enumerate(found.best, start=1):
            plan = candidate.plan
            table.add_row(
                str(number),
                plan.layout.describe(),
                str(plan.recipe.run.microbatch_rows),
                plan.recipe.parallel.recompute,
                f"{plan.time.seconds:.3g}",
                f"{plan.tokens_per_s_per_gpu:,.0f}",
                f"{plan.mfu:.1%}",
                f"{plan.fullest.total / units.GIB:.1f}",
                candidate.why,
            )
        print_table(out, table)
        words = " ".join(found.best[0].overrides) or "none: the recipe is the best already"
        out.print(f"\nThe first layout as overrides:\n  {words}", soft_wrap=True)
    if limit:
        out.print("\n" + limit, soft_wrap=not out.is_terminal)  # whole in files: it can be searched
    if found.rejected:
        out.print("\nNot shown:")
        for reason, count in found.rejected.items():
            out.print(f"  {count:6,} {reason}")


def _gib(size: float) -> str:
    return f"{size / units.GIB:.2f}" if size >= 0.005 * units.GIB else ("0" if not size else f"{size / units.GIB:.1g}")

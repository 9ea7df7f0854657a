"""From a CSV row of published throughput to a `Setting` that the planner can predict, or the reason why it cannot.

Columns (all but model, gpu and n_gpu may be empty): src, release, model, gpu, n_gpu, precision, gbs, mbs, seqlen, fsdp, tp, pp,
cp, vp, ep, dp, zero, recompute, extra, tok_s_gpu, model_tflops_gpu, mfu_pct, mem_gib, note.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from launch.plan.cost.device import Format, find_device
from launch.plan.cost.time import Setting
from launch.plan.published.cells import gpu_count, integer, number
from launch.plan.published.models import NotExpressible, latent_attention, model_named
from launch.plan.published.software import Row, shards_of, software_of
from recipes.schema.layout import Layout
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import (
    ATTENTION,
    balanced_ranges,
    layer_kinds,
    layer_matmul_weights,
    mtp_kinds,
    mtp_projection_weights,
)

PUBLISHED = Path(__file__).parent / "published_throughput.csv"
"""333 rows collected from public documents; each row's `src` names its document."""
PUBLISHED_LATER = PUBLISHED.with_name("published_more.csv")
"""Rows of other publishers and models, collected after the planner was built. They were predicted before any fitting on them
(docs/plan.md)."""


class OutOfScope(Exception):
    """The row is not predicted. The message is the reason."""


@dataclass(frozen=True)
class Published:
    """A row that the planner can predict."""

    setting: Setting
    tokens_per_s: float
    """Published, per GPU."""
    memory_gib: float | None
    recompute_published: bool
    is_optimizer_sharded: bool
    is_loss_compiled: bool
    """Whether torch.compile fuses the loss with the cast of the logits (torchtitan since 2025)."""
    assumed: tuple[str, ...]
    """Assumptions about what the row does not state."""

    @property
    def step_s(self) -> float:
        """Published time of a step."""
        layout = self.setting.layout
        tokens = layout.microbatches_per_step * self.setting.rows * self.setting.sequence * layout.data
        return tokens / layout.world / self.tokens_per_s


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. Raises ValueError for a missing column."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        missing = {"model", "gpu", "n_gpu"} - set(reader.fieldnames)
        if missing:
            raise ValueError(f"no column {', '.join(sorted(missing))}; it needs the columns of {PUBLISHED.name}.")
        return [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]


def published(row: Row) -> Published:
    """Read one row. Raises OutOfScope if it cannot be predicted."""
    assumed: list[str] = []
    get = row.get
    note = get("note", "").lower()
    if "lora" in note or "peft" in note:
        raise OutOfScope("LoRA: frozen weights need no gradient")
    try:
        model = model_named(row["model"], source=get("src", ""))
    except NotExpressible as reason:
        raise OutOfScope(str(reason)) from None
    device = find_device(row["gpu"])
    if device is None:
        raise OutOfScope(f"device {row['gpu']!r} is not in the device table" if row["gpu"] else "GPU not named")
    world, sequence = gpu_count(row["n_gpu"], device), integer(get("seqlen", ""))
    if not world or not sequence:
        raise OutOfScope("number of GPUs or sequence length not published")
    low, scaling = _precision(get("precision", ""), assumed)
    if low is not None and low not in device.peak:
        raise OutOfScope(f"{device.name} has no {low} matrix products")
    has_experts = "E" in layer_kinds(model.pattern)
    layout, rows = _layout(row, world=world, sequence=sequence, has_experts=has_experts, assumed=assumed)
    if has_experts and model.experts.count % layout.expert:
        raise OutOfScope(f"EP{layout.expert} does not divide {model.experts.count} experts")
    setting = Setting(
        model=model,
        layout=layout,
        stages=tuple(_stages(model, layout.pipeline * layout.virtual)),
        rows=rows,
        sequence=sequence,
        device=device,
        low=low,
        scaling=scaling,
        high_precision_layers=_tail(row, model, assumed),
        split_sequence=layout.tensor > 1,
        recompute=_recompute(get("recompute", "")),
        latent=latent_attention(row["model"]),
        software=software_of(row, device, model=model, layout=layout),
    )
    return Published(
        setting=setting,
        tokens_per_s=_throughput(row, setting),
        memory_gib=_memory_gib(row),
        recompute_published=bool(get("recompute", "")),
        is_optimizer_sharded=get("zero", "") != "0",
        is_loss_compiled="compile" in get("extra", "").lower() and (integer(get("release", "")) or 0) >= 2025,
        assumed=tuple(assumed),
    )


def _precision(text: str, assumed: list[str]) -> tuple[Format | None, str]:
    """(low-precision format, how it is scaled) of a precision cell."""
    plain = text.lower()
    if "rowwise" in plain or "row-wise" in plain:
        raise OutOfScope("FP8 with row-wise scales, which no recipe of this project has")
    if "fp4" in plain:
        return "fp4", "nvfp4"
    if "mx" in plain and "(fp8-mx)" not in plain and "paren" not in plain:
        return "fp8", "mxfp8"
    if "fp8" in plain or "float8" in plain:
        return "fp8", "current"
    for other in ("int8", "fp32", "float32", "tf32", "fp16", "float16"):
        if other in plain and "bf16" not in plain:
            raise OutOfScope(f"{other} training")
    if not plain or plain in ("n/a", "-", "?"):
        assumed.append("bf16")
    elif not re.search(r"b(f|float)?16|bfloat|amp|mixed", plain):
        raise OutOfScope(f"precision {text!r} is unknown to this planner")
    return None, "none"


TAIL = 0.15
"""Share of the layers at the end that stay in bf16 where a row says so without a number (NVFP4's recipe, arXiv 2509.25149)."""


def _tail(row: Row, model: ModelConfig, assumed: list[str]) -> frozenset[int]:
    """Indexes of the layers in bf16 of a row in low precision."""
    if "tail" not in row.get("precision", "").lower():
        return frozenset()
    layers = len(layer_kinds(model.pattern))
    assumed.append(f"last {TAIL:.0%} of the layers in bf16")
    return frozenset(range(layers - round(TAIL * layers), layers))


def _layout(row: Row, *, world: int, sequence: int, has_experts: bool, assumed: list[str]) -> tuple[Layout, int]:
    """(degrees, rows of a microbatch)."""

    def degree(name: str) -> int:
        return integer(row.get(name, "")) or 1

    tensor, pipeline, context, virtual = degree("tp"), degree("pp"), degree("cp"), degree("vp")
    expert = degree("ep") if has_experts else 1
    if world % (tensor * pipeline * context):
        raise OutOfScope(f"TP{tensor} x PP{pipeline} x CP{context} does not divide {world} GPUs")
    in_words = shards_of(row) != "optimizer" or re.search(r"\bddp\b", row.get("extra", "").lower())
    if world // pipeline % expert:
        raise OutOfScope(f"EP{expert} does not divide the {world // pipeline} GPUs of a stage")
    has_layout = in_words or any(integer(row.get(name, "")) for name in ("tp", "pp", "cp", "fsdp", "dp", "ep"))
    if not has_layout and world > 1:
        raise OutOfScope("layout not published")
    data = world // (tensor * pipeline * context)
    rows, total = integer(row.get("mbs", "")) or None, integer(row.get("gbs", "")) or None
    if total and ("tok" in row["gbs"].lower() or re.match(r"\s*[\d.]+\s?M", row["gbs"])):
        total = max(1, round(total / sequence))  # a batch given in tokens
    tokens = re.search(r"(\d+(?:\.\d+)?)m tokens", row.get("note", "").lower())
    if total is None and tokens:
        total = round(float(tokens.group(1)) * 2**20 / sequence)
        assumed.append(f"global batch {total} from the note")
    steps = re.search(r"\bgas ?=?(\d+)", row.get("extra", "").lower())
    if total is None and rows is not None and steps:
        total = rows * data * int(steps.group(1))
    if rows is None:
        if total is None:
            raise OutOfScope("neither microbatch nor global batch published")
        rows = 1
        assumed.append("microbatch of 1 row")
    if total is None:
        total = rows * data
        if pipeline > 1 and "torchtitan" not in row.get("src", "").lower():
            raise OutOfScope("global batch not published, and with it the pipeline's microbatches")
        assumed.append("one batch a step")
    if pipeline > 1 and "torchtitan" in row.get("src", "").lower():
        assumed.append(f"a local batch of {rows} in microbatches of 1 row")
        rows = (
            1  # its local_batch_size is what a rank reads; the schedule cuts it (pipeline_parallel_microbatch_size, 1)
        )
    microbatches = max(1, round(total / (rows * data)))
    if pipeline == 1:
        virtual = 1
    elif not row.get("vp") and "nanotron" not in row.get("src", ""):
        virtual = _virtual(row.get("extra", "").lower(), assumed)
    return Layout(world, tensor, pipeline, virtual, context, data, microbatches, expert), rows


def _virtual(words: str, assumed: list[str]) -> int:
    """Virtual stages of a row without that cell. The schedule 1F1B has one chunk a rank; torchtitan's Interleaved1F1B has two."""
    if re.search(r"(?<!interleaved)(?<!interleaved[ -])1f1b", words):
        return 1
    virtual = 2 if "interleaved" in words else 4
    assumed.append(f"{virtual} virtual pipeline stages")
    return virtual


def _stages(model: ModelConfig, stages: int) -> list[str]:
    """Pattern of each chunk: whole blocks, evenly divided, with the head and further depths counted as the publishers do."""
    kinds = layer_kinds(model.pattern)
    blocks = re.findall(r"[*w][-E]|M[-E]|.", "".join(kinds))
    costs = [sum(layer_matmul_weights(kind, model) for kind in block) for block in blocks]  # type: ignore[misc]
    if stages > len(blocks) + 2:
        raise OutOfScope(f"{stages} pipeline chunks for {len(blocks)} blocks")
    if stages > len(blocks):  # embedding and head have chunks of their own
        ends = [""] * (stages - len(blocks))
        return [*ends[1:], *blocks, *ends[:1]]
    head = model.vocab * model.hidden
    depth = head + mtp_projection_weights(model) + sum(layer_matmul_weights(kind, model) for kind in mtp_kinds(model))
    costs[-1] += head + model.mtp.depths * depth
    return ["".join(blocks[a:b]) for a, b in balanced_ranges(costs, stages)]


def _recompute(text: str) -> float:
    """Share of the layers' forward pass that is recomputed."""
    plain = text.lower()
    if "full" in plain or plain in ("true", "yes", "on"):
        return 1.0
    if "select" in plain or "sac" in plain:
        return 0.4  # torchtitan keeps every second matrix product and recomputes the rest
    return 0.0


def _throughput(row: Row, setting: Setting) -> float:
    """Published tokens/s of one GPU, from tokens/s, TFLOP/s or MFU, whichever the row has."""
    direct = number(row.get("tok_s_gpu", ""))
    if direct:
        return direct
    per_token = flops_as_published(row, setting.model, setting.sequence)
    tflops = number(row.get("model_tflops_gpu", ""))
    if tflops:
        return tflops * 1e12 / per_token
    mfu = number(row.get("mfu_pct", ""))
    if mfu:
        mfu *= 100 if mfu <= 1 else 1  # 0.43 for 43 %
        return mfu / 100 * setting.device.peak["bf16"] / per_token
    raise OutOfScope("no throughput published")


def _memory_gib(row: Row) -> float | None:
    """Published peak in GiB; some files give GB."""
    found = number(row.get("mem_gib", ""))
    is_decimal = found is not None and "gb peak" in row.get("note", "").lower()
    return found * 1e9 / 2**30 if found is not None and is_decimal else found


def flops_as_published(row: Row, model: ModelConfig, sequence: int) -> float:
    """FLOPs of a token by the publisher's convention: 6 for each weight of a product (head included), plus attention scores.

    Megatron-LM's table (mcore 0.8), nanotron, torchtitan, llm-foundry and NeMo until 25.04 include the masked half of attention.
    NVIDIA's later tables and this project do not.
    """
    source = row.get("src", "").lower()
    kinds = layer_kinds(model.pattern)
    weights = sum(layer_matmul_weights(kind, model) for kind in kinds) + model.vocab * model.hidden
    full = any(name in source for name in ("megatron-lm", "nanotron", "nemo ", "torchtitan", "llm-foundry"))
    return (
        6.0 * weights
        + (12.0 if full else 6.0) * sum(kind in ATTENTION for kind in kinds) * model.heads * model.head_dim * sequence
    )

"""From a published model's name to a recipe's model fields, by `public_models.toml` and `expert_models.toml` in this folder.

"LLAMA3.1_405B", "Llama 3.1 405B" --> pattern `*-` x 126, hidden 16384, ...
"GPT 7.1B (L30 h4096 a32 vocab131072)" --> the shape written in the name
"Mixtral 8x22B", "Qwen3_235B_a22B" --> pattern `*E` x 56, x 94, ...
"DeepSeekV4 Flash" --> NotExpressible: experts, and a shape that is not in the table
"""

import re
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from launch.plan.cost.layer_work import LatentAttention
from recipes.schema.experts import ExpertsConfig
from recipes.schema.model import ModelConfig
from recipes.schema.mtp import MtpConfig

_EXPERTS = re.compile(
    r"mixtral|\bmoe\b|deepseek ?(v[2-9]|r1(?! distill)|moe)|gpt ?oss|"
    r"\ba\d+(\.\d+)?b\b|\d+ ?x ?\d+ ?b|scout|maverick|dbrx|grok|olmoe|kimi|minimax|arctic|"
    r"jamba|nemotron ?3 ?(nano|super|ultra|5|\.5)|glm ?[45]|moonlight|step ?3|ling ?\d|hunyuan|switch|bailing"
)
_LAYERS = re.compile(r"falcon ?h1|zamba|hymba|griffin|recurrentgemma|granite ?4")
_OTHER = re.compile(
    r"bert|\bt5\b|flux|diffusion|clip\b|whisper|\bvl\b|vision|llava|rwkv|stable ?diff|sdxl|\bvit\b|\bdit\b"
)
_FAMILIES = (
    (r"codestral ?mamba|mamba ?codestral", "codestral-mamba"), (r"code ?llama", "codellama"),
    (r"llama|llamma", "llama"), (r"mistral ?nemo", "mistral-nemo"),
    (r"mistral|codestral", "mistral"), (r"ministral", "ministral"),
    (r"qwen", "qwen"), (r"gemma", "gemma"), (r"olmo", "olmo"), (r"gpt ?3", "gpt3"), (r"gpt ?2", "gpt2"),
    (r"nemotron ?h", "nemotron-h"), (r"nemotron ?nano|nano ?v2", "nemotron-nano"), (r"nemotron", "nemotron"),
    (r"\bmpt\b", "mpt"), (r"pythia", "pythia"), (r"smollm", "smollm"), (r"\bphi", "phi"), (r"falcon", "falcon"),
    (r"nanotron", "nanotron"), (r"gpt ?neox", "gpt-neox"), (r"gpt ?j\b", "gpt-j"), (r"\bopt\b", "opt"), (r"bloom", "bloom"),
    (r"\byi\b", "yi"), (r"deepseek", "deepseek"), (r"internlm", "internlm"), (r"granite", "granite"),
    (r"starcoder", "starcoder"), (r"command ?r", "command-r"), (r"apertus", "apertus"), (r"bamba", "bamba"),
    (r"\bgpt(?! ?neo)|megatron|turing", "gpt3"),
)  # fmt: skip


class NotExpressible(Exception):
    """The model is unknown, or no recipe of this project can express it. The message is the reason."""


def model_named(name: str, *, source: str = "") -> ModelConfig:
    """The fields of a published model. source: the publisher, for names that contain only a size. Raises NotExpressible."""
    if not name.strip():
        raise NotExpressible("model not named")
    plain = _plain(name)
    entry = _expert_entry(plain)
    if entry is not None:
        further = 0 if re.search(r"w/?o ?mtp|without ?mtp", name.lower()) else entry.get("mtp", 0)
        return _expert_config(entry, further)
    if _EXPERTS.search(plain):
        raise NotExpressible("experts: no public shape in the table (launch/plan/published/expert_models.toml)")
    if _OTHER.search(plain):
        raise NotExpressible("not a decoder-only language model")
    written = _written_shape(plain)
    if written is not None:
        return written
    if _LAYERS.search(plain):
        raise NotExpressible(
            "layers that no recipe can express (attention and Mamba in parallel, shared, or recurrent)"
        )
    size = re.search(r"(\d+(?:\.\d+)?) ?(t|b|m)\b", plain)
    found = [(match, family) for part, family in _FAMILIES if (match := re.search(part, plain))]
    if not found and "nanotron" in source.lower():
        family, version = "nanotron", ""
    elif found:
        match, family = found[0]
        after = re.match(r" ?v?(\d+(?:\.\d+)?)(?![\d.]| ?[bmt]\b)", plain[match.end() :])
        version = after.group(1) if after else ("2" if family == "nemotron-nano" else "")
    else:
        raise NotExpressible("model not in the table of public shapes (launch/plan/published/public_models.toml)")
    if size is None:
        raise NotExpressible("model name without a size")
    billions = float(size.group(1)) * {"m": 0.001, "b": 1, "t": 1000}[size.group(2)]
    for entry in _table():
        if entry["family"] != family or (version not in entry["versions"] and version):
            continue
        for shape in entry["shapes"]:
            if any(abs(billions - one) <= 0.04 * one for one in shape["size"]):
                return _config(shape)
    raise NotExpressible(
        f"no public shape known for {family} {version} {size.group(0)} (launch/plan/published/public_models.toml)"
    )


def latent_attention(name: str) -> LatentAttention | None:
    """Multi-head latent attention of a published model, which no recipe can express; None if it has ordinary attention."""
    entry = _expert_entry(_plain(name))
    if entry is None or "latent_keys" not in entry:
        return None
    return LatentAttention(query=entry.get("latent_query", 0), keys=entry["latent_keys"])


def _plain(name: str) -> str:
    return re.sub(r"[_/-]+", " ", name.lower())


def _expert_entry(plain: str) -> dict[str, Any] | None:
    return next((entry for entry in _expert_table() if re.search(entry["name"], plain)), None)


@cache
def _expert_table() -> list[dict[str, Any]]:
    return tomllib.loads((Path(__file__).parent / "expert_models.toml").read_text())["model"]


def _expert_config(entry: dict[str, Any], further: int) -> ModelConfig:
    pattern = entry.get("pattern") or _blocks(entry)
    if "pattern" not in entry:
        every, dense = entry.get("every", 1), entry.get("dense", 0)
        blocks = re.findall("..", pattern)
        pattern = "".join(
            f"{block[0]}E" if layer >= dense and (layer + 1) % every == 0 else block
            for layer, block in enumerate(blocks)
        )
    config = _config(entry | {"pattern": pattern})
    return replace(
        config,
        experts=ExpertsConfig(**entry["experts"]),
        mtp=MtpConfig(depths=further, pattern="*E", repeated=entry.get("shared_mtp", False)),
    )


@cache
def _table() -> list[dict[str, Any]]:
    return tomllib.loads((Path(__file__).parent / "public_models.toml").read_text())["model"]


def _config(shape: dict[str, Any]) -> ModelConfig:
    heads = shape["heads"]
    extras: dict[str, Any] = {key: value for key, value in shape.items() if key.startswith("mamba_")}
    if extras:
        extras = {"mamba_groups": 8, "mamba_chunk": 128} | extras
    return ModelConfig(
        pattern=shape.get("pattern", _blocks(shape)),
        hidden=shape["hidden"],
        vocab=shape["vocab"],
        ffn=shape.get("ffn", 4 * shape["hidden"]),
        activation=shape.get("activation", "swiglu"),
        heads=heads,
        kv_heads=shape.get("kv_heads", heads),
        head_dim=shape.get("head_dim", shape["hidden"] // heads),
        position="none" if extras or shape.get("activation") == "gelu" else "rope",
        tie_embeddings=shape.get("tie", False),
        window_tokens=shape.get("window", 4096),
        post_norms=shape.get("post_norms", False),
        **extras,
    )


def _blocks(shape: dict[str, Any]) -> str:
    """The pattern of alternating attention and MLP. Attention has a window in all blocks, in the first of every `window_every`
    blocks, or in all but the last of every `global_every` blocks."""
    global_every = shape.get("global_every", 0)
    if global_every:
        return "".join("*-" if layer % global_every == global_every - 1 else "w-" for layer in range(shape["layers"]))
    every = shape.get("window_every", 1 if "window" in shape else 0)
    return "".join("w-" if every and not layer % every else "*-" for layer in range(shape.get("layers", 0)))


def _written_shape(plain: str) -> ModelConfig | None:
    """The shape written in a name: L layers, h hidden, a heads, and optionally f, kv and vocab. None if it has no shape."""
    numbers = {
        key: int(found.group(1))
        for key in ("l", "h", "a", "f", "kv", "vocab")
        if (found := re.search(rf"\b{key} ?=? ?(\d+)\b", plain))
    }
    if not numbers.keys() >= {"l", "h", "a"} or numbers["h"] % numbers["a"]:
        return None
    gated = "swiglu" in plain or "geglu" in plain
    return ModelConfig(
        pattern="*-" * numbers["l"],
        hidden=numbers["h"],
        vocab=numbers.get("vocab", 51200),
        ffn=numbers.get("f", 4 * numbers["h"]),
        activation="swiglu" if gated else "gelu",
        heads=numbers["a"],
        kv_heads=numbers.get("kv", numbers["a"]),
        head_dim=numbers["h"] // numbers["a"],
    )

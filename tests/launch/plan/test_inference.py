"""Memory of inference against the figures of the paper."""

from pathlib import Path

import pytest
import yaml

from launch.plan.cost.inference import inference_memory
from recipes.schema.model import ModelConfig
from recipes.schema.typed import build

MODELS = Path(__file__).resolve().parents[3] / "recipes" / "model"


def shipped(name: str) -> ModelConfig:
    return build(ModelConfig, yaml.safe_load((MODELS / f"{name}.yaml").read_text()), "model")


@pytest.mark.parametrize(("name", "gib"), [("nemotron_nano_9b_v2", 18.62), ("nemotron_nano_12b_v2", 26.0)])
def test_nano_2_at_131072_tokens(name: str, gib: float) -> None:
    """The 9B fits the 19.66 GiB that arXiv 2508.14444 (section 4) leaves of an A10G; the 12B it was pruned from does not."""
    found = inference_memory(shipped(name), context_tokens=131_072)
    assert found.gib == pytest.approx(gib, abs=0.01)
    assert (found.gib < 19.66) == (name == "nemotron_nano_9b_v2")


def test_windows_bound_keys_and_values() -> None:
    """Gemma 2 9B: 42 layers, 8 heads of 256, half of them see 4,096 tokens (arXiv 2408.00118)."""
    found = inference_memory(shipped("gemma2_9b"), context_tokens=8192)
    assert found.keys_values == 2 * 2 * 8 * 256 * (21 * 8192 + 21 * 4096)
    assert found.mamba_states == 0

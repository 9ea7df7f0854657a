"""One layer of each kind of Nano 12B, Nemotron-H 56B and Gemma 2 27B at full width, bf16, against transformers in float64.

Many GB of memory: the MLP of H-56B has 537 million weights, in float64 alone 4.3 GB. Rounding to bf16 (8 bits) of activations
and weights moves values by 2e-3 to 1e-2 of their root mean square; the smoke recipe's widths show the same
(tests/gpu/test_layers.py), so what is tested here is that width changes nothing.
"""

from dataclasses import replace

import pytest
import torch
from layers_in_float64 import VOCAB, differences
from ranks import run_ranks

from launch.compose import compose

pytestmark = pytest.mark.slow
LENGTH = 160
"""More than one chunk of the scan (128)."""


def measured(rank: int, name: str, pattern: str) -> dict[str, float]:
    torch.set_num_threads(2)
    recipe = compose(["-cn", name], program="test")
    assert not isinstance(recipe, int)
    # Rows are shorter than the published window, which would then do nothing.
    model = replace(recipe.model, pattern=pattern, vocab=VOCAB, window_tokens=LENGTH // 2)
    return differences(model, storage="bf16", device=torch.device("cpu"), length=LENGTH)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("nemotron_nano_12b_v2", "M"), ("nemotron_nano_12b_v2", "*"), ("nemotron_nano_12b_v2", "-"),
        ("nemotron_h_56b", "M"), ("nemotron_h_56b", "*"), ("nemotron_h_56b", "-"),
        ("gemma2_27b", "w-"), ("gemma2_27b", "*-"),
    ],
)  # fmt: skip
def test_a_layer_at_full_width_equals_float64(name: str, pattern: str) -> None:
    (found,) = run_ranks(1, measured, name, pattern, timeout_s=600)
    print(name, pattern, {key: round(value, 5) for key, value in found.items()})
    assert max(found.values()) < 3e-2, found

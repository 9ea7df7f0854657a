"""Layers of both families on a GPU against transformers' in float64 on the CPU: logits and every gradient.

With STRATUM_REHEARSAL=1 they run on a CPU (`stratum doctor --qualify --rehearse`). **Not run on a GPU.**
"""

import os

import pytest
import torch
from layers_in_float64 import LAYERS, differences

from recipes.schema.model import ModelConfig

REHEARSAL = "STRATUM_REHEARSAL" in os.environ
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not REHEARSAL, reason="needs a GPU"),
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_layers_equal_float64(name: str, storage: str) -> None:
    model: ModelConfig = LAYERS[name]
    found = differences(model, storage=storage, device=torch.device("cpu" if REHEARSAL else "cuda"), length=256)
    # fp32: sums in another order (torch uses TF32 only on request). bf16 has 8 bits; several activations are rounded in a row.
    assert max(found.values()) < (1e-5 if storage == "fp32" else 3e-2), found

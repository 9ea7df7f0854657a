"""Choosing a backend: missing packages are named, and unsupported settings are refused instead of computed wrongly."""

import pytest
import torch
from tiny import TINY

from recipes.schema.errors import BackendError
from recipes.schema.precision import PrecisionConfig
from train.megatron import choose_device
from train.model.backend import TransformerEngineBackend, choose_backend


def test_without_a_gpu_the_reference_is_chosen() -> None:
    assert choose_backend(PrecisionConfig(), torch.device("cpu")).name == "reference"


def test_an_explicit_te_names_what_is_missing() -> None:
    with pytest.raises(BackendError, match=r"precision\.backend=te needs a GPU"):
        choose_backend(PrecisionConfig(backend="te"), torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without a GPU")
def test_asking_for_a_gpu_without_one_is_an_error() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(BackendError, match=r"run\.device=cuda, but there is no GPU"):
        choose_device("cuda")


def test_te_refuses_block_scales_that_its_environment_contradicts(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    backend = TransformerEngineBackend()
    for value, power_of_two, remedy in ((None, False, f"{variable}=1"), ("1", True, f"{variable}=0")):
        monkeypatch.delenv(variable, raising=False)
        if value is not None:
            monkeypatch.setenv(variable, value)
        wrong = PrecisionConfig(scaling="blockwise", power_of_two_scales=power_of_two)
        with pytest.raises(BackendError, match=f"Start with {remedy}"):
            backend.options(TINY, wrong)
        right = PrecisionConfig(scaling="blockwise", power_of_two_scales=not power_of_two)
        assert backend.options(TINY, right)["fp8_recipe"] == "blockwise"

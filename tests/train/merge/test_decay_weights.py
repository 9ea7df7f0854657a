"""Weights of an average that emulates a decay: against runs of plain SGD in float64, and by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest

from train.merge.decay_weights import Shape, decay_weights

SHAPES: tuple[Shape, ...] = ("linear", "cosine", "minus_sqrt")


def left(shape: Shape, t: float) -> float:
    """What is left of the learning rate at progress t, as the papers print it."""
    return {"linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2, "minus_sqrt": 1 - math.sqrt(t)}[shape]


def run(factors: list[float], gradients: np.ndarray) -> np.ndarray:
    """SGD in float64 at learning rate 0.1 x factor. -> the weights before the first and after each update."""
    weights = [np.full(gradients.shape[1], 0.5)]
    for factor, gradient in zip(factors, gradients, strict=True):
        weights.append(weights[-1] - 0.1 * factor * gradient)
    return np.array(weights)


def test_weights_by_hand() -> None:
    assert decay_weights([0, 1, 2, 3, 4], shape="linear") == pytest.approx([0.25, 0.25, 0.25, 0.25, 0], abs=1e-15)
    assert decay_weights([7, 9], shape="linear", final_fraction=0.5) == pytest.approx([0.375, 0.625], abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_average_of_every_step_is_the_decayed_run(shape: Shape, final: float) -> None:
    count = 12
    gradients = np.random.default_rng(3).normal(size=(count, 5))
    stable = run([1.0] * count, gradients)
    decayed = run([final + (1 - final) * left(shape, step / count) for step in range(1, count + 1)], gradients)
    weights = decay_weights(range(count + 1), shape=shape, final_fraction=final)
    assert min(weights) >= 0 and sum(weights) == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(np.array(weights) @ stable, decayed[-1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoints_far_apart_stand_for_all_steps_between_them(shape: Shape) -> None:
    """Exact where the gradient does not change between two checkpoints, whatever their distances; total of the rates always."""
    steps = [100, 103, 104, 111, 120]
    length = steps[-1] - steps[0]
    rows = np.random.default_rng(4).normal(size=(len(steps) - 1, 3))
    gradients = np.concatenate([np.tile(row, (b - a, 1)) for row, (a, b) in zip(rows, pairwise(steps), strict=True)])
    stable = run([1.0] * length, gradients)
    decayed = run([left(shape, step / length) for step in range(1, length + 1)], gradients)
    weights = decay_weights(steps, shape=shape)
    merged = sum(w * stable[step - steps[0]] for w, step in zip(weights, steps, strict=True))
    np.testing.assert_allclose(merged, decayed[-1], rtol=0, atol=1e-14)


def test_a_broken_order_of_the_weights_is_noticed() -> None:
    """The same numbers reversed are not the decayed run: the tests above can fail."""
    gradients = np.random.default_rng(3).normal(size=(12, 5))
    stable = run([1.0] * 12, gradients)
    decayed = run([left("minus_sqrt", step / 12) for step in range(1, 13)], gradients)
    weights = decay_weights(range(13), shape="minus_sqrt")[::-1]
    assert np.abs(np.array(weights) @ stable - decayed[-1]).max() > 0.01

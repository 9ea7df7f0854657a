"""Verifiers of math-verify and reasoning-gym in our process. Runs in .trl/ (install_trl.sh)."""

import json

import pytest

from recipes.schema.errors import DataError
from train.align.verify.judge import Judge
from train.align.verify.sample import Sample

pytestmark = pytest.mark.oracle


def test_mathematical_equality() -> None:
    pairs = [
        ("1/2", "0.5", 1), ("42", "so \\boxed{42}", 1), ("$x^2+2x+1$", "$(x+1)^2$", 1), ("3", "4", 0), ("3", "none", 0),
    ]  # fmt: skip
    with Judge({"kind": "math"}) as judge:
        found = judge.rewards([Sample("", answer, {"target": target}) for target, answer, _ in pairs])
        assert [reward.value for reward in found] == [value for *_, value in pairs]
        hostile = judge.rewards([Sample("", "$9^{9^{9^{9^{9}}}}$", {"target": "3"})])[0]
        assert hostile.value in (0.0, None)
        assert judge.rewards([Sample("", "$2$", {"target": "2"})])[0].value == 1


def test_scorers_of_reasoning_gym() -> None:
    import reasoning_gym

    for generator in ("chain_sum", "countdown", "word_sorting"):
        dataset = reasoning_gym.create_dataset(generator, size=2, seed=5)
        entries = [json.loads(json.dumps(dataset[index], default=str)) for index in range(2)]
        right = [str(entry["answer"] or entry["metadata"].get("expression")) for entry in entries]
        with Judge({"kind": "reasoning", "generator": generator}) as judge:
            good = judge.rewards([Sample("", a, {"entry": e}) for a, e in zip(right, entries, strict=True)])
            wrong = judge.rewards([Sample("", "wrong", {"entry": entry}) for entry in entries])
        assert [reward.value for reward in good] == [1.0, 1.0], generator
        assert all(reward.value is not None and reward.value < 0.1 for reward in wrong), generator
    with pytest.raises(DataError, match="no generator 'chain_sm'"):
        Judge({"kind": "reasoning", "generator": "chain_sm"})

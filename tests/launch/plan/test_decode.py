"""Predicted speed of generation against published figures."""

import json
from dataclasses import replace

import pytest
from test_inference import shipped

from launch.plan.command import main
from launch.plan.cost.decode import BANDWIDTH_SHARE, decode_memory, decode_speed, largest_batch
from launch.plan.cost.device import device_named
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import parameters

A10G = device_named("a10g")
QWEN3_8B = ModelConfig(
    pattern="*-" * 36, hidden=4096, ffn=12288, heads=32, kv_heads=8, head_dim=128, vocab=151936, activation="swiglu",
    position="rope",
)  # fmt: skip
"""Qwen3-8B (its config.json) without the norms of queries and keys."""
READ, WRITTEN = 8192, 16384
"""The setting of arXiv 2508.14444, figure 1."""


def speed_at_the_largest_batch(model: ModelConfig) -> tuple[int, float]:
    batch = largest_batch(model, A10G, context_tokens=READ + WRITTEN)
    found = decode_speed(model, A10G, context_tokens=READ + WRITTEN, batch=batch, read_tokens=READ + WRITTEN / 2)
    return batch, found.tokens_per_s


def test_nano_2_on_an_a10g() -> None:
    """arXiv 2508.14444: 161.02 tokens/s at batch 8 (table 10), 6.3 times Qwen3-8B at the largest batches that fit (figure 1)."""
    assert parameters(QWEN3_8B).total == pytest.approx(8_190_735_360, rel=1e-5)
    batch, speed = speed_at_the_largest_batch(shipped("nemotron_nano_9b_v2"))
    assert batch == 8 and speed == pytest.approx(161.02, rel=0.15)
    _, transformer = speed_at_the_largest_batch(QWEN3_8B)
    assert speed / transformer == pytest.approx(6.3, rel=0.20)


def test_llama_2_7b_on_an_a100() -> None:
    """gpt-fast's README: 104.9 tokens/s at batch 1 with a prompt of 5 tokens."""
    llama = ModelConfig(
        pattern="*-" * 32, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000, activation="swiglu",
        position="rope",
    )  # fmt: skip
    found = decode_speed(llama, device_named("a100_80gb"), context_tokens=205, batch=1, read_tokens=105)
    assert found.tokens_per_s == pytest.approx(104.9, rel=0.05)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    for name in ("nemotron_nano_9b_v2", "gemma2_2b"):
        model, context = shipped(name), 20_000
        most = largest_batch(model, A10G, context_tokens=context)
        fits = [
            decode_memory(model, context_tokens=context, batch=most + more) <= 0.95 * 22.06 * 2**30 for more in (0, 1)
        ]
        assert fits == [True, False]
    assert largest_batch(shipped("nemotron_nano_12b_v2"), A10G, context_tokens=1024) == 0


def test_a_model_without_caches_has_no_largest_batch() -> None:
    layers = ModelConfig(pattern="--", hidden=64, ffn=128, vocab=256)
    assert largest_batch(layers, A10G, context_tokens=1024) == 1
    assert largest_batch(replace(layers, hidden=1 << 17, ffn=1 << 17), A10G, context_tokens=1024) == 0


def test_a_plan_prints_the_speed_of_generation(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-cn", "smoke", "model=nemotron_nano_9b_v2", "--device", "a10g"]
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)["decode"]
    assert [(one["context_tokens"], one["batch"]) for one in found][-1] == (
        131_072,
        2,
    )  # 16.56 GiB of weights, 2.13 GiB a text, 20.96 GiB usable
    main(words)
    out = capsys.readouterr().out
    assert "Generation on one a10g" in out and "131,072" in out


def test_a_step_reads_the_experts_that_its_texts_choose() -> None:
    """One text reads its active weights; very many read all. 3 Nano has 28.0 billion idle weights of 31.6."""
    model = shipped("nemotron3_nano_30b_a3b")
    device, count = device_named("h100"), parameters(model)
    one = decode_speed(model, device, context_tokens=1, batch=1)
    read = 2 * (count.active - count.embedding)
    assert one.tokens_per_s == pytest.approx(BANDWIDTH_SHARE * device.hbm / read, rel=0.03)
    many = decode_speed(model, device, context_tokens=1, batch=512)
    assert 512 / many.tokens_per_s > 2 * 0.99 * (count.total - count.embedding) / (BANDWIDTH_SHARE * device.hbm)

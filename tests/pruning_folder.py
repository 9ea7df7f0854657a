"""A recipe with a few lines of text and a model of a few thousand parameters, and commands that run in its folder."""

import contextlib
import io
import os
from pathlib import Path

from train import stratum

MODEL = """
{pattern: M-*-, hidden: 32, vocab: 320, ffn: 64, heads: 4, kv_heads: 2, head_dim: 8, mamba_heads: 4, mamba_groups: 2,
 mamba_head_dim: 8, mamba_state: 8, mamba_chunk: 8}
"""
RECIPE = """
defaults: [model: little, data: little, parallel: single, precision: fp32, objective: next_token, optim: adamw,
           schedule: constant, launch: standard, compress: standard, _self_]
run: {name: parent, steps: 2, seed: 1, global_rows: 2, microbatch_rows: 2, device: cpu, threads: 1}
data: {folder: prepared, sources: {python: {path: words.txt, weight: 1.0}}, tokenizer: {vocab_size: 320}, row_tokens: 16,
       workers: 1, heldout_fraction: 0.2}
schedule: {warmup: 0}
evaluate: {rows_per_source: 2, every_steps: 1}
telemetry: {tensorboard: false}
compress: {parent: runs/parent, folder: cut, calibration_rows: 4, depth_rows: 2}
stages: {once more: "compress score run.name=hunt compress.layers=3 compress.attention_layers=1"}
"""


def shell(rank: int, folder: Path, words: list[str]) -> tuple[int, str]:
    """For `run_ranks`: `stratum WORDS` in a separate process and folder. -> (exit status, what it printed)."""
    os.chdir(folder)
    if "-cn" in words and "--config-dir" not in " ".join(words):
        words = [*words, "--config-dir", "recipes"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = stratum.main(words)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue()


def lay_out(root: Path, *, stages: str = "") -> None:
    """Write recipes and text into a folder. stages: a `stages:` section instead of the recipe's."""
    (root / "recipes").mkdir()
    recipe = RECIPE[: RECIPE.index("stages:")] + stages if stages else RECIPE
    (root / "recipes" / "little.yaml").write_text("# @package _global_\n" + recipe)
    for group, text in (("model", MODEL), ("data", "seed: 1234\n")):
        (root / "recipes" / group).mkdir()
        (root / "recipes" / group / "little.yaml").write_text(text)
    (root / "words.txt").write_text("\n\n".join(f"line {n} of {n * n} words, {n % 7} again" for n in range(400)))

"""`make bench-align`: a step of GRPO against TRL's with transformers' `generate`, of models of the same shape. Prints Markdown.

Both draw the same number of answers to the same prompts at temperature 1, at most the same number of tokens (random weights
rarely end an answer), score them with the same function, keep a reference for the KL term, and update all weights once. They take
turns, step by step, in one process. Runs in .trl/ (tests/train/align/install_trl.sh):

    .trl/bin/python -m tests.bench.grpo [--threads 1] [--steps 4] [--hidden 256] [--prompts 8] [--answers 16] [--tokens 64]
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from chats import tokenizer, tokenizer_file
from parity.peers import peer_of
from policy_runs import policy_recipe, policy_stream, prompts_in, write_start
from ranks import run_ranks

from recipes.schema.recipe import Recipe
from train.build import build_engine, check, mesh_of
from train.checkpoint.manager import checkpoint_at
from train.record.stopwatch import Stopwatch
from train.step import train_step


def digit_share(text: str) -> float:
    """The reward: share of the characters that are digits, as `tests.reward_functions`."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


def recipe_of(folder: Path, options: argparse.Namespace) -> Recipe:
    """A hybrid of ten layers, with one microbatch of packed answers for a step."""
    hidden = options.hidden
    room = options.tokens + 32
    return policy_recipe(
        folder,
        **{
            "model.pattern": "M-M*-M-M*-", "model.hidden": hidden, "model.ffn": 4 * hidden, "model.heads": hidden // 64,
            "model.kv_heads": 2, "model.head_dim": 64, "model.mamba_heads": hidden // 32, "model.mamba_head_dim": 64,
            "model.mamba_state": 64, "model.mamba_groups": 2, "model.mamba_chunk": 64, "data.row_tokens": 4 * room,
            "run.microbatch_rows": 8, "run.global_rows": 8, "objective.grpo.prompts_per_step": options.prompts,
            "objective.grpo.generations_per_prompt": options.answers, "objective.grpo.max_answer_tokens": options.tokens,
            "objective.grpo.generation_rows": options.prompts * options.answers, "objective.grpo.kl_weight": 0.01,
        },
    )  # fmt: skip


@contextmanager
def ours(recipe: Recipe) -> Iterator[Callable[[], tuple[float, float, int]]]:
    """A function that makes one step. -> seconds of the step, of generation in it, tokens generated."""
    with mesh_of(recipe, check(recipe, world=1), device=torch.device("cpu"), rank=0) as mesh:
        weights, _ = checkpoint_at(str(recipe.run.start_from))
        engine = build_engine(recipe, mesh, weights=weights)
        step = 0
        with policy_stream(engine, recipe) as (stream, events):

            def work() -> tuple[float, float, int]:
                nonlocal step
                began = time.perf_counter()
                train_step(engine, next(stream), step=step, learning_rate=1e-6, watch=Stopwatch())
                step += 1
                event = [event for event in events.found if event["kind"] == "rollouts"][-1]
                return time.perf_counter() - began, event["generation_s"], event["generated_tokens"]

            yield work


def theirs(recipe: Recipe, folder: Path, options: argparse.Namespace) -> Callable[[], tuple[float, float, int]]:
    """The same by TRL's trainer, on transformers' model."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file()))
    end = words.convert_ids_to_tokens(tokenizer().eod)
    words.eos_token, words.pad_token = end, end
    peer_of(recipe.model).save_pretrained(folder / "peer")  # the reference is loaded from there
    words.save_pretrained(folder / "peer")
    answers = options.prompts * options.answers
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=answers, num_generations=options.answers, beta=0.01,
        max_completion_length=options.tokens, temperature=1.0, learning_rate=1e-6, max_steps=10_000, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no", logging_strategy="no", use_bias_correction_kl=False, gradient_checkpointing=False,
        disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [f"Say {n}." for n in range(options.prompts * (options.steps + 1))]})
    trainer = GRPOTrainer(
        model=str(folder / "peer"), reward_funcs=lambda completions, **_: [digit_share(text) for text in completions],
        args=arguments, train_dataset=prompts, processing_class=words,
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
    model = trainer.accelerator.prepare_model(trainer.model)
    trainer.model_wrapped = model
    trainer.current_gradient_accumulation_steps = 1  # set by `train`, which cannot take turns with ours
    loader = iter(trainer.get_train_dataloader())
    seconds, tokens = [0.0], [0]
    generate = trainer._generate_single_turn

    def timed(*words: Any, **named: Any) -> Any:
        began = time.perf_counter()
        found = generate(*words, **named)
        seconds[0] += time.perf_counter() - began
        tokens[0] += sum(len(ids) for ids in found[0])
        return found

    trainer._generate_single_turn = timed

    def work() -> tuple[float, float, int]:
        seconds[0], tokens[0] = 0.0, 0
        began = time.perf_counter()
        trainer.training_step(model, next(loader), answers)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
        return time.perf_counter() - began, seconds[0], tokens[0]

    return work


def main() -> None:
    """Print a table of a step of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("threads", 2), ("steps", 4), ("hidden", 256), ("prompts", 8), ("answers", 16), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prompts_in(folder, count=options.prompts * (options.steps + 1))
        recipe = recipe_of(folder, options)
        run_ranks(1, write_start, recipe)
        torch.set_num_threads(options.threads)
        other = theirs(recipe, folder, options)
        with ours(recipe) as own:
            rows: dict[str, list[tuple[float, float, int]]] = {"ours": [], "TRL, transformers": []}
            for number in range(options.steps + 1):  # the first step of each does not count
                for name, work in zip(rows, (own, other), strict=True):
                    found = work()
                    if number:
                        rows[name].append(found)
    print(
        f"{options.prompts} prompts x {options.answers} answers of at most {options.tokens} tokens, hidden {options.hidden}, "
        f"{options.threads} threads, median of {options.steps} steps, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print(
        "| | s a step | generation | tokens drawn | tokens/s, whole step | tokens/s, generation |\n|---|---|---|---|---|---|"
    )
    speeds = {}
    for name, steps in rows.items():
        step, generation, tokens = (statistics.median(one[place] for one in steps) for place in range(3))
        speeds[name] = tokens / step
        print(
            f"| {name} | {step:.2f} | {100 * generation / step:.0f} % | {tokens:,.0f} | {tokens / step:,.0f} | "
            f"{tokens / generation:,.0f} |"
        )
    print(f"\nratio of whole steps, tokens/s: {speeds['ours'] / speeds['TRL, transformers']:.2f} (goal 3)")


if __name__ == "__main__":
    main()

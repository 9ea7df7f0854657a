"""lm-evaluation-harness on our model gives the scores of its model for transformers on the export, for all kinds of requests;
the tasks of HumanEval and reasoning-gym. Runs in .harness/ (install_harness.sh), so its packages are imported in functions.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hf_models import HYBRID, exported, recipe_of, scrambled, trained
from ranks import run_ranks
from shards import TEXT, random_documents, write_folder
from task_files import command

from data.tokenizer import load_tokenizer
from recipes.schema.data import SourceConfig, TokenizerConfig
from recipes.schema.errors import DataError
from recipes.schema.recipe import Recipe
from train.build import model_on_ranks
from train.evaluate.ask import ask
from train.evaluate.decoder import BatchedDecoder, before_stop
from train.evaluate.score import forward_of_model
from train.evaluate.tasks.catalog import open_tasks
from train.hf.check import load_theirs
from train.inference.request import Sampling

pytestmark = pytest.mark.oracle
CPU = torch.device("cpu")
ROW_TOKENS = 96

TASKS: dict[str, dict[str, Any]] = {
    "choosing": {
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": "{{a}}",
        "target_delimiter": " ", "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    "reading": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        ],
    },
    "writing": {
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{t}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path]:
    """(recipe, checkpoint, folder): a scrambled model, its data with the tokenizer, an export, tasks of the harness."""
    root = tmp_path_factory.mktemp("harness")
    write_folder(root / "data", {"a": [random_documents(60, seed=3)]})
    recipe = recipe_of(replace(HYBRID, vocab=300))
    data = replace(recipe.data, folder=str(root / "data"), row_tokens=ROW_TOKENS, sources={"a": SourceConfig(path="x")})
    recipe = replace(recipe, data=data)
    path = scrambled(trained(root / "run", recipe, world=1), root / "moved")
    exported(path, root / "hf", recipe.model)
    words = TEXT.split()
    items = [
        {
            "q": " ".join(words[i : i + 2 + i % 5]),
            "c": [words[i + 7], words[i + 8], "fox and dog"],
            "a": i % 3,
            "t": "x",
        }
        for i in range(12)
    ]
    items[3]["q"] = TEXT[:900]  # longer than a row
    (root / "tasks").mkdir()
    (root / "tasks" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, task in TASKS.items():
        data_files = {"test": str(root / "tasks" / "items.jsonl")}
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data_files},
            "test_split": "test",
        }
        (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return recipe, path, root


def harness_command(rank: int, *words: str) -> tuple[int, str]:
    torch.set_num_threads(1)
    return command(*words)


def test_scores_are_those_of_the_harness_on_the_export(place: tuple[Recipe, Path, Path], tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate  # only in .harness/
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    _, path, root = place
    theirs = load_theirs(root / "hf", dtype=torch.float32, device=CPU)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(root / "data" / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
    model = HFLM(pretrained=theirs, tokenizer=tokenizer, max_length=ROW_TOKENS, batch_size=1, device="cpu")
    wanted: Any = simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)

    words = ["--harness", ",".join(TASKS), "--harness-folder", str(root / "tasks"), "--row-tokens", str(ROW_TOKENS)]
    for batch_rows in ("1", "5"):
        out = tmp_path / batch_rows
        ((status, text),) = run_ranks(
            1, harness_command, str(path), *words, "--out", str(out), "--batch-rows", batch_rows
        )
        assert status == 0, text
        found = json.loads((out / "results.json").read_text())["tasks"]
        assert set(found) == {f"lm-eval/{name}" for name in TASKS}
        for task in TASKS:
            for metric, entry in found[f"lm-eval/{task}"]["metrics"].items():
                assert entry["value"] == pytest.approx(wanted["results"][task][f"{metric},none"], rel=1e-5)
                assert entry["low"] <= entry["value"] <= entry["high"]
            samples = [
                json.loads(line) for line in (out / "samples" / f"lm-eval_{task}.jsonl").read_text().splitlines()
            ]
            assert len(samples) == 12
            for ours, right in zip(samples, wanted["samples"][task], strict=True):
                _same_answers(task, ours["filtered_resps"], right["filtered_resps"])
    ((status, text),) = run_ranks(1, harness_command, str(path), *words, "--out", str(out), "--resume")
    assert status == 0 and "already in results.json: lm-eval/choosing" in text
    ((status, text),) = run_ranks(
        1, harness_command, str(path), "--harness", "chosing", "--harness-folder", str(root / "tasks")
    )
    assert status == 2 and "there is no task 'chosing' in" in text and "Did you mean choosing?" in text


def _same_answers(task: str, ours: list[Any], theirs: list[Any]) -> None:
    if task == "writing":
        assert ours == theirs
        return
    for one, other in zip(ours, theirs, strict=True):
        if task == "reading":
            assert one == pytest.approx(float(other), rel=1e-5)
        else:
            assert one[0] == pytest.approx(other[0], abs=1e-4) and one[1] == other[1]


def by_our_decoder(rank: int, recipe: Recipe, path: Path, prompts: list[str]) -> tuple[list[str], list[str], Any]:
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(Path(recipe.data.folder) / "tokenizer.json", TokenizerConfig())
    with model_on_ranks(recipe, path, device=CPU, rank=0, world=1) as (model, mesh):
        decoder = BatchedDecoder(model, recipe.model, tokenizer, mesh=mesh)
        greedy = Sampling(temperature=0.0)
        long = decoder.generate(prompts, max_new_tokens=20, stop=[], sampling=greedy)
        cut = decoder.generate(prompts, max_new_tokens=20, stop=["e", " t"], sampling=greedy)
        forward = forward_of_model(model, row_tokens=64, microbatch_rows=4, mesh=mesh)
        tasks = open_tasks(
            ["human-eval", "reasoning/chain_sum", "bfcl/simple_python"], tokenizer=tokenizer, seed=1, items=2
        )
        asked = [ask(task, forward=forward, tokenizer=tokenizer, decoder=decoder) for task in tasks]
        return long, cut, [result.metrics["score"].value for result in asked]


def test_stop_texts_end_answers_and_packages_ask_their_items(place: tuple[Recipe, Path, Path]) -> None:
    recipe, path, _ = place
    prompts = ["the quick", "fox", " lazy dog and", "a"]
    ((long, cut, values),) = run_ranks(1, by_our_decoder, recipe, path, prompts)
    for whole, part in zip(long, cut, strict=True):
        ended = before_stop(whole, ["e", " t"])
        assert part == (whole if ended is None else ended)
    assert values == [0.0, pytest.approx(0.0, abs=0.1), 0.0], "a model of random weights solves nothing"


def test_right_answers_of_the_packages_are_right_and_wrong_ones_wrong(place: tuple[Recipe, Path, Path]) -> None:
    tokenizer = load_tokenizer(Path(place[0].data.folder) / "tokenizer.json", TokenizerConfig())
    code, sums = open_tasks(["human-eval", "reasoning/chain_sum"], tokenizer=tokenizer, seed=1, items=5)
    assert code.runs_code and code.judge is not None and sums.judge is not None and len(sums.items) == 5
    for item in code.items:
        assert code.judge(item, item.targets[0]) == 1 and code.judge(item, "    return None\n") == 0
    for item in sums.items:
        assert sums.judge(item, item.targets[0]) == 1 and sums.judge(item, " none") < 0.1
    again = open_tasks(["reasoning/chain_sum"], tokenizer=tokenizer, seed=1, items=5)[0]
    other = open_tasks(["reasoning/chain_sum"], tokenizer=tokenizer, seed=2, items=5)[0]
    assert again.hash == sums.hash != other.hash
    with pytest.raises(DataError, match=r"no task 'reasoning/chain_sums'\. Did you mean reasoning/chain_sum\?"):
        open_tasks(["reasoning/chain_sums"], tokenizer=tokenizer, seed=0)


def test_code_runs_only_where_it_is_allowed(place: tuple[Recipe, Path, Path]) -> None:
    status, text = command(str(place[1]), "--tasks", "human-eval")
    assert status == 2 and "human-eval runs code that the model wrote. Allow it with --run-code" in text

"""Function calls: right and wrong answers by hand; and BFCL's own parser and checker on every item of its data and on damaged
answers (`make test-oracle`).

The package imports clients of a dozen providers and parsers of Java; none of them takes part in Python calls, and all are
replaced by empty modules here.
"""

import importlib
import importlib.util
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from recipes.schema.errors import BackendError, DataError
from recipes.schema.tasks import BFCL_KINDS
from train.evaluate.tasks.catalog import open_tasks
from train.evaluate.tasks.function_calls import Call, open_bfcl, parse
from train.evaluate.tasks.task import Item, Task

AREA = {
    "name": "geo.area",
    "description": "Area of a shape.",
    "parameters": {
        "type": "dict",
        "properties": {
            "sides": {"type": "array", "items": {"type": "integer"}, "description": ""},
            "height": {"type": "float", "description": ""},
            "unit": {"type": "string", "description": ""},
            "style": {"type": "dict", "description": ""},
            "exact": {"type": "boolean", "description": ""},
        },
        "required": ["sides", "height"],
    },
}
PLAY = {
    "name": "play",
    "description": "Play a song.",
    "parameters": {"type": "dict", "properties": {"artist": {"type": "string"}}, "required": ["artist"]},
}
ANSWER = {
    "geo.area": {
        "sides": [[3, 4]], "height": [5.0], "unit": ["square metres", ""],
        "style": [{"colour": ["red", "blue"], "wide": ["", 1]}, ""], "exact": ["", True],
    }
}  # fmt: skip
"""What the package's files give for one call: of each argument the possible values; "" for one that may be left out."""
PROMPTS = """
PROMPT_STYLE_TEMPLATES = {"classic": {
    "persona": "You call functions.", "task": "Read on.", "tool_call_no_tag": "Write {output_format}. {param_types}",
    "multiturn_behavior": "Once.", "available_tools": "In {format}:\\n{functions}"}}
PROMPT_TEMPLATE_MAPPING = {"plaintext": "{persona}{task}|{tool_call_format}|{multiturn_behavior}|{available_tools}"}
OUTPUT_FORMAT_MAPPING, PARAM_TYPE_MAPPING = {"python": "[f(x=1)]"}, {"python": ""}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like bfcl-eval with one item of some parts. -> its data folder."""
    question = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How large is it?"}]]
    data = tmp_path / "bfcl_eval" / "data"
    (data / "possible_answer").mkdir(parents=True)
    (tmp_path / "bfcl_eval" / "__init__.py").touch()
    (tmp_path / "bfcl_eval" / "constants").mkdir()
    (tmp_path / "bfcl_eval" / "constants" / "default_prompts.py").write_text(PROMPTS)
    played = [{"play": {"artist": ["Ann"]}}, {"play": {"artist": ["Bob"]}}]
    for kind, answers in {
        "simple_python": [ANSWER],
        "parallel": played,
        "irrelevance": None,
        "live_relevance": None,
    }.items():
        functions = [AREA, PLAY] if answers == [ANSWER] else [PLAY]
        record = {"id": f"{kind}_0", "question": question, "function": functions}
        (data / f"BFCL_v4_{kind}.json").write_text(json.dumps(record) + "\n")
        if answers is not None:
            (data / "possible_answer" / f"BFCL_v4_{kind}.json").write_text(
                json.dumps({"id": "0", "ground_truth": answers})
            )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bfcl_eval"]:
        monkeypatch.delitem(sys.modules, name)
    yield data
    for name in [name for name in sys.modules if name.partition(".")[0] == "bfcl_eval"]:
        del sys.modules[name]


def judged(task: Task, answer: str) -> float:
    assert task.judge is not None
    return task.judge(task.items[0], answer)


ONE_CALL = {
    "[geo.area(sides=[3, 4], height=5.0)]": 1,
    " geo.area(height=5, sides=[3, 4])": 1,
    "`[geo.area(sides=[3, 4], height=2+3)]`": 1,
    "geo.area(sides=[3, 4], height=5.0, unit='Square-Metres', exact=True)": 1,
    "geo.area(sides=[3, 4], height=5.0, style={'colour': 'Blue'})": 1,
    "geo.area(sides=[3, 4], height=5.0, style={'colour': 'green'})": 0,
    "geo.area(sides=[3, 4], height=5.0, style={'wide': 1})": 0,
    "geo.area(sides=[3, 4], height=5.0, style='red')": 0,
    "area(sides=[3, 4], height=5.0)": 0,
    "geo.area(sides=[3, 4])": 0,
    "geo.area(sides=[4, 3], height=5.0)": 0,
    "geo.area(sides=(3, 4), height=5.0)": 0,
    "geo.area(sides=[3.0, 4.0], height=5.0)": 0,
    "geo.area(sides=[3, 4], height='5.0')": 0,
    "geo.area(sides=[3, 4], height=5.0, width=1)": 0,
    "geo.area(sides=[3, 4], height=5.0, unit='feet')": 0,
    "geo.area(sides=[3, 4], height=5.0, exact=1)": 0,
    "geo.area([3, 4], 5.0)": 0,
    "geo.area(sides=[3, 4], height=5.0), geo.area(sides=[3, 4], height=5.0)": 0,
    "The area is 10.": 0,
    "[]": 0,
    "": 0,
}


def test_one_call_is_right_by_name_types_and_possible_answers(files: Path) -> None:
    task = open_bfcl("bfcl/simple_python")
    for answer, score in ONE_CALL.items():
        assert judged(task, answer) == score, answer
    item = task.items[0]
    assert item.prompt.startswith("You call functions.Read on.|Write [f(x=1)]. |Once.|In json:\n[\n    {")
    assert (
        item.prompt.endswith("Be brief.\n\nUser: How large is it?\nAssistant:") and "in Python 3 syntax." in item.prompt
    )
    assert (
        item.targets
        == (
            " [geo.area(sides=[3, 4], height=5.0, unit='square metres', style={'colour': 'red', 'wide': 1}, exact=True)]",
        )
        and judged(task, item.targets[0]) == 1
    )


def test_several_calls_come_in_any_order_and_each_once(files: Path) -> None:
    task = open_bfcl("bfcl/parallel")
    assert (
        judged(task, "[play(artist='Ann'), play(artist='Bob')]")
        == judged(task, "play(artist='BOB'), play(artist='ann')")
        == 1
    )
    assert judged(task, "[play(artist='Ann'), play(artist='Ann')]") == judged(task, "[play(artist='Ann')]") == 0


def test_no_call_and_any_call(files: Path) -> None:
    for answer, is_call in {"[f(x=1)]": 1, "f()": 1, "I cannot do that.": 0, "[]": 0, "3": 0, "": 0}.items():
        assert judged(open_bfcl("bfcl/irrelevance"), answer) == 1 - is_call, answer
        assert judged(open_bfcl("bfcl/live_relevance"), answer) == is_call, answer


@pytest.mark.parametrize(
    "answer",
    ["f(x=9**9**9**9)", "f(x=10**200*10**200)", "f(x='a'*10**9)", "f(x=1/0)", "f(x=1<<9)", "f(x=__import__('os'))",
     "[" * 5000, "f(" * 5000, "f(x=" + "-" * 5000 + "1)", "f(x=" + "9" * 5000 + ")", "f(x={[1]: 2})", "\0", "f(x='\\d')",
     "f(x=1.5e400)", "f(x=(yield))", "\ud800"],
)  # fmt: skip
def test_nothing_is_executed_and_no_answer_stops_the_evaluation(files: Path, answer: str) -> None:
    assert judged(open_bfcl("bfcl/simple_python"), answer) == 0
    assert parse("f(x=__import__('os'))") == [Call("f", {"x": "__import__('os')"})]


def test_missing_package_and_damaged_data_are_one_error(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no task 'bfcl/simple_pyton'\. Did you mean bfcl/simple_python\?"):
        open_tasks(["bfcl/simple_pyton"], tokenizer=None, seed=0)  # type: ignore[arg-type]
    (files / "BFCL_v4_parallel.json").write_text('{"id": ')
    with pytest.raises(
        DataError, match=r"BFCL_v4_parallel\.json cannot be read .*Install the package again: pip install --no-deps"
    ):
        open_bfcl("bfcl/parallel")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="Install it without its dependencies: pip install --no-deps bfcl-eval"):
        open_bfcl("bfcl/parallel")


# ---- against the package


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


@pytest.fixture(scope="module")
def package() -> Any:
    """(the package's parser, its checker, its readers, its enums)."""
    pytest.importorskip("bfcl_eval", reason="runs in .harness (make test-oracle)")
    config = _Empty("bfcl_eval.constants.model_config")
    plain = mock.Mock(underscore_to_dot=False)
    config.MODEL_CONFIG_MAPPING = defaultdict(lambda: plain)
    parsers = [f"bfcl_eval.model_handler.parser.{name}_parser" for name in ("java", "js")]
    empty: dict[str, ModuleType] = {name: _Empty(name) for name in ("tenacity", *parsers)}
    with mock.patch.dict(sys.modules, empty | {config.__name__: config}):
        utils = importlib.import_module("bfcl_eval.model_handler.utils")
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        entries = importlib.import_module("bfcl_eval.utils")
        enums = importlib.import_module("bfcl_eval.constants.enums")
        yield utils, checker, entries, enums


def verdict(package: Any, kind: str, item: Any, answer: str) -> float:
    """The package's: `_evaluate_single_ast_entry` and `_evaluate_single_relevance_entry` of its `eval_runner`."""
    utils, checker, entries, enums = package
    try:
        calls = utils.default_decode_ast_prompting(answer)
    except Exception:  # as the package does
        calls = None
    if "relevance" in kind:
        return float((calls is not None and not entries.is_empty_output(calls)) is ("irrelevance" not in kind))
    if calls is None or not entries.is_function_calling_format_output(calls):
        return 0.0
    facts = item.facts
    result = checker.ast_checker(facts["functions"], calls, facts["answers"], enums.Language.PYTHON, kind, "any")
    return float(result["valid"])


def damaged(answer: str, draw: random.Random) -> str:
    """The answer with one thing changed, or its text cut, swapped or wrapped."""
    calls = parse(answer)
    if not calls:
        return draw.choice(["[f(x=1)]", "I cannot.", "[]", "f(1)", "[f]", "{'a': 1}", "[f(x=1), 3]", "f(x=1), g()"])

    def text(name: str, arguments: dict[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    at = draw.randrange(len(calls))
    name, given = calls[at].name, dict(calls[at].arguments)
    key = draw.choice([*given, "nothing"])
    old = given.get(key)
    match draw.randrange(12):
        case 0:
            name += "x"
        case 1:
            given.pop(key, None)
        case 2:
            given["unheard_of"] = 1
        case 3:
            given[key] = str(old)
        case 4:
            given[key] = [old]
        case 5:
            given[key] = old.upper() + " " if isinstance(old, str) else -old if isinstance(old, int | float) else ()
        case 6:
            given[key] = float(old) if type(old) is int else int(old) if type(old) is float else None
        case 7:
            given[key] = tuple(old) if isinstance(old, list) else {"a": old}
        case 8:
            given[key] = old[:-1] if isinstance(old, list | str) else True
        case 9:
            return answer.strip().strip("[]")
        case 10:
            return f"```\n{answer}\n```"
        case 11:
            return f"[{', '.join(text(call.name, dict(call.arguments)) for call in reversed(calls))}]"
    texts = [text(call.name, dict(call.arguments)) for call in calls]
    texts[at] = text(name, given)
    return f"[{', '.join(texts)}]"


@pytest.mark.oracle
@pytest.mark.parametrize("kind", BFCL_KINDS)
def test_the_package_judges_every_item_as_we_do(kind: str, package: Any) -> None:
    task = open_bfcl(f"bfcl/{kind}")
    draw = random.Random(kind)
    rights = [0, 0]
    for item in task.items:
        expected = item.targets[0]
        assert task.judge is not None
        for number, answer in enumerate([expected, *(damaged(expected, draw) for _ in range(8))]):
            theirs = verdict(package, kind, item, answer)
            assert task.judge(item, answer) == theirs, (item.place, answer, item.facts["answers"])
            rights[number > 0] += int(theirs)
    assert rights[0] >= 0.98 * len(task.items) or kind == "live_relevance"
    assert 0 < rights[1] < 8 * len(task.items)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "answer",
    ["f(x=2*3+1)", "f(x=-5)", "f(x=a[0])", "f(x=g(1))", "f(x=g(y=1))", "[f(x=1)][0]", "a.b.c(x=None)", "f(x=1,", "f(x=lambda: 1)",
     "f(x={'a': (1, 2)})", "f(x=...)", "f(x=a.b)", "'[f(x=1)]'", "f(x='it''s')", "f(x={1, 2})", ""],
)  # fmt: skip
def test_texts_are_parsed_as_the_package_parses_them(answer: str, package: Any) -> None:
    try:
        theirs = package[0].default_decode_ast_prompting(answer)
    except Exception:  # as the package does
        theirs = None
    ours = parse(answer)
    assert (None if ours is None else [{call.name: dict(call.arguments)} for call in ours]) == theirs


@pytest.mark.oracle
def test_the_package_judges_the_answers_by_hand_alike(package: Any) -> None:
    item = Item("", "", facts={"functions": [AREA], "answers": [ANSWER]})
    for answer, score in ONE_CALL.items():
        assert verdict(package, "simple_python", item, answer) == score, answer


@pytest.mark.oracle
def test_prompts_are_the_packages_instructions(package: Any) -> None:
    utils, _, entries, _ = package
    for kind in BFCL_KINDS:
        for entry, item in zip(entries.load_dataset_entry(kind), open_bfcl(f"bfcl/{kind}").items, strict=True):
            system = utils.system_prompt_pre_processing_chat_model(
                entry["question"][0], entry["function"], entry["id"]
            )[0]
            assert item.prompt.startswith(system["content"].rstrip()), item.place

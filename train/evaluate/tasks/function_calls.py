"""Function calls: the Berkeley Function Calling Leaderboard, from data and prompts of the wheel `bfcl-eval`.

    question, functions --prompt--> answer --parse--> [Call(name, arguments)] --check--> possible answers of the package

Only the parts with Python calls and one turn are used. A call is right if it has the function's name, all required parameters, no
unknown ones, and for each a value of the documented type that is among the possible answers. Texts are compared in lower case
without blanks and `,./-_*^`. `irrelevance` parts want no call, `live_relevance` wants any. Parsing and rules follow the
package's own (`model_handler/utils.py`, `ast_checker.py`, version 2026.3.23); tests compare with it. Two differences:
arithmetic in arguments is bounded instead of handed to `eval`, and `+5` is 5.

The wheel is installed without its dependencies (numpy 1.26 and clients of many providers among them): none is needed here.
"""

import ast
import importlib
import importlib.util
import json
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.schema.errors import BackendError, DataError
from recipes.schema.tasks import BFCL
from train.evaluate.tasks.task import Item, Task

_PACKAGE = "bfcl_eval"
_INSTALL = "pip install --no-deps bfcl-eval==2026.3.23"
_TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict, "any": str,
}  # fmt: skip
_LISTS = ("array", "tuple")
_IGNORED = re.compile(r"[ ,./\-_*^]")
_HINT = " Note that the provided function is in Python 3 syntax."
_NO_CALL = "(no function call)"
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_LARGEST = 1e30
"""Of a number in arithmetic: larger ones are no answer."""


@dataclass(frozen=True)
class Call:
    """A function call as text says it."""

    name: str
    arguments: Mapping[str, Any]
    """The keyword arguments. Others are ignored, as in the package."""


def open_bfcl(name: str, *, items: int | None = None) -> Task:
    """A part of the leaderboard: `bfcl/simple_python`. BackendError if its package is missing, DataError if its data is."""
    kind = name.removeprefix(BFCL)
    folder = _data_folder()
    records = _lines(folder / f"BFCL_v4_{kind}.json")
    answers: list[Any] = [None] * len(records)
    if "relevance" not in kind:
        answers = [record["ground_truth"] for record in _lines(folder / "possible_answer" / f"BFCL_v4_{kind}.json")]
    prompts = importlib.import_module(f"{_PACKAGE}.constants.default_prompts")  # an optional package; texts only
    asked = [
        Item(
            f"{name} {record['id']}",
            prompt_of(record, prompts),
            (_NO_CALL if answer is None else f" {expected(answer)}",),
            facts={"functions": record["function"], "answers": answer},
        )
        for record, answer in zip(records[:items], answers[:items], strict=True)
    ]

    def judge(item: Item, answer: str) -> float:
        calls = parse(answer)
        if "relevance" in kind:
            return float(bool(calls) is ("irrelevance" not in kind))
        wants_any_order = "parallel" in kind
        return float(calls is not None and is_right(calls, **item.facts, wants_any_order=wants_any_order))

    return Task(
        name=name, kind="generate", items=tuple(asked), max_new_tokens=512, stop=("\n\n", "\nUser:"), judge=judge
    )


def prompt_of(record: Mapping[str, Any], prompts: Any) -> str:
    """The package's instructions with the functions, then the conversation as plain text."""
    style = prompts.PROMPT_STYLE_TEMPLATES["classic"]
    functions = [one | {"description": one["description"] + _HINT} for one in record["function"]]
    system = prompts.PROMPT_TEMPLATE_MAPPING["plaintext"].format(
        persona=style["persona"],
        task=style["task"],
        tool_call_format=style["tool_call_no_tag"].format(
            output_format=prompts.OUTPUT_FORMAT_MAPPING["python"], param_types=prompts.PARAM_TYPE_MAPPING["python"]
        ),
        multiturn_behavior=style["multiturn_behavior"],
        available_tools=style["available_tools"].format(format="json", functions=json.dumps(functions, indent=4)),
    )
    (turns,) = record["question"]
    own = "".join(f"\n\n{turn['content']}" for turn in turns if turn["role"] == "system")
    said = "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in turns if turn["role"] != "system")
    return f"{system}{own}\n\n{said}Assistant:"


def expected(answers: Sequence[Mapping[str, Any]]) -> str:
    """One of the right answers, as text: of each argument the first possible value."""

    def chosen(possible: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for key, values in possible.items():
            given = [value for value in _options(values) if value != ""]
            if given:
                found[key] = plain(given[0])
        return found

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return chosen(value)
        return [plain(one) for one in value] if isinstance(value, list) else value

    calls = []
    for answer in answers:
        ((function, arguments),) = answer.items()
        given = chosen(arguments)
        calls.append(f"{function}({', '.join(f'{key}={value!r}' for key, value in given.items())})")
    return f"[{', '.join(calls)}]"


# ---- from text to calls


def parse(answer: str) -> list[Call] | None:
    """The calls of an answer `[f(x=1), g(y="a")]`; None if it is something else. Nothing is executed."""
    text = answer.strip("`\n ")
    text = text if text.startswith("[") else f"[{text}"
    text = (text if text.endswith("]") else f"{text}]").strip().strip("'")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about escapes in texts
            body = ast.parse(text, mode="eval").body
        elements = (
            [body] if isinstance(body, ast.Call) else body.elts if isinstance(body, ast.List | ast.Tuple) else None
        )
        if elements is None or not all(isinstance(one, ast.Call) for one in elements):
            return None
        return [_call(one) for one in elements if isinstance(one, ast.Call)]
    except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError):
        return None


def _call(node: ast.Call) -> Call:
    parts = []
    function = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    arguments = {keyword.arg or "**": _value(keyword.value) for keyword in node.keywords}
    return Call(".".join(reversed(parts)), arguments)


def _value(node: ast.expr) -> Any:
    """The value of an argument: of literals themselves, of names and other calls their text. ValueError for anything else."""
    match node:
        case ast.Constant():
            return "..." if node.value is Ellipsis else node.value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as number)):
            return -number if isinstance(node.op, ast.USub) else number
        case ast.BinOp():
            return _number(node)
        case ast.List():
            return [_value(one) for one in node.elts]
        case ast.Tuple():
            return tuple(_value(one) for one in node.elts)
        case ast.Dict():
            if None in node.keys:
                raise ValueError("a dictionary is spread into another")
            return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
        case ast.Name():
            return node.id
        case ast.Call():
            call = _call(node)
            return {call.name: call.arguments} if node.keywords else ast.unparse(node)
        case ast.Subscript():
            return ast.unparse(node)
    raise ValueError(f"{type(node).__name__} is no value")


def _number(node: ast.expr) -> Any:
    """Arithmetic of numbers; ValueError where a result is too large to be meant."""
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left), _number(node.right)
        if isinstance(node.op, ast.Pow) and (abs(right) > 100 or abs(left) > _LARGEST):
            raise ValueError("the power is too large")
        result = _OPERATIONS[type(node.op)](left, right) if type(node.op) in _OPERATIONS else None
    else:
        result = _value(node)
    if not isinstance(result, int | float) or abs(result) > _LARGEST:
        raise ValueError("this is not arithmetic of numbers")
    return result


# ---- from calls to right or wrong


def is_right(
    calls: Sequence[Call], *, functions: Sequence[Any], answers: Sequence[Mapping[str, Any]], wants_any_order: bool
) -> bool:
    """Whether the calls are the wanted ones, as many and each once. answers: for each, {name: {argument: possible values}}."""
    if len(calls) != len(answers):
        return False
    left = list(calls)
    for answer in answers:
        ((name, possible),) = answer.items()
        described = next((function for function in functions if function["name"] == name), functions[0])
        place = next(
            (i for i, call in enumerate(left) if _fits(call, described["name"], described["parameters"], possible)),
            None,
        )
        if place is None or (place and not wants_any_order):
            return False
        left.pop(place)
    return True


def _fits(call: Call, name: str, parameters: Mapping[str, Any], possible: Mapping[str, Sequence[Any]]) -> bool:
    """Whether one call is the wanted one."""
    given, described = call.arguments, parameters["properties"]
    if call.name != name or any(parameter not in given for parameter in parameters["required"]):
        return False
    if any(key not in described or key not in possible for key in given):
        return False
    if any(key not in given and "" not in values for key, values in possible.items()):
        return False
    return all(_value_fits(value, described[key], possible[key]) for key, value in given.items())


def _value_fits(value: Any, described: Mapping[str, Any], possible: Sequence[Any]) -> bool:
    """Whether an argument has the described type and a possible value. A text may stand for a variable, whose name the possible
    answers then give instead of a value of the type."""
    wanted = _TYPES[described["type"]]
    inner = _TYPES[described["items"]["type"]] if described["type"] in _LISTS else None
    if described["type"] == "tuple" and isinstance(value, tuple):
        value = list(value)
    if described["type"] == "float" and type(value) is int:
        value = float(value)
    has_type, is_variable = _type_fits(value, possible, wanted, inner)
    if not has_type:
        return False
    if not is_variable:
        if wanted is dict:
            return any(_dict_fits(value, one) for one in possible if one != "")
        if wanted is list and inner is dict:
            return any(_dicts_fit(value, one) for one in possible)
        if wanted is str:
            return _plain(value) in [_plain(one) for one in possible if isinstance(one, str)]
        if wanted is list:
            return [_plain(one) for one in value] in [list(map(_plain, one)) for one in possible]
    return value in possible


def _type_fits(value: Any, possible: Sequence[Any], wanted: type, inner: type | None) -> tuple[bool, bool]:
    """(whether the type is right, whether the value counts as a variable)."""
    answer_type = next((type(one) for one in possible if one != ""), None)

    def items_fit(one: Any, inner: type) -> bool:
        return not isinstance(one, list) or all(_type_fits(item, one, inner, None)[0] for item in value)

    if type(value) is wanted:
        fits = inner is None or any(items_fit(one, inner) for one in possible)
        return fits, answer_type is not None and answer_type is not wanted
    return type(value) is answer_type, type(value) is answer_type


def _dict_fits(value: Any, possible: Mapping[str, Any]) -> bool:
    """Whether each entry has a possible value, and no entry is missing that has to be there."""
    return (
        isinstance(value, dict)
        and all(
            key in possible and _plain(entry) in map(_plain, _options(possible[key])) for key, entry in value.items()
        )
        and all(key in value or "" in _options(values) for key, values in possible.items())
    )


def _options(values: Any) -> list[Any]:
    """Possible values of an entry; the data also has single values without a list."""
    return values if isinstance(values, list) else [values]


def _dicts_fit(value: Sequence[Any], possible: Sequence[Any]) -> bool:
    return len(value) == len(possible) and all(map(_dict_fits, value, possible))


def _plain(value: Any) -> Any:
    """A text as it is compared; other values as they are."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


# ---- the package's files


def _data_folder() -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise BackendError(
            f"this task needs the data of the package bfcl-eval. Install it without its dependencies: {_INSTALL}."
        )
    return Path(next(iter(found.submodule_search_locations))) / "data"


def _lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Install the package again: {_INSTALL}.") from error

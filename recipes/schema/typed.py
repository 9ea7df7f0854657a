"""Builds a typed dataclass from a plain mapping, and reports all mistakes at once.

    {"hidden": 256, ...} --build--> ModelConfig(hidden=256, ...)   or one FieldError with a line for each mistake

Supported types: dataclasses, int, float, str, bool, Literal, X | None, dict[str, X], list[X], tuple[X, ...], and any of them
inside `typing.Annotated` with a `Range`. Numbers are not converted silently: `2.0` is not an int, and `true` is not a number.
For a float, an int is accepted, and a text such as `1e-3`, which is how YAML reads this number.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any

from recipes.schema.errors import DataError
from recipes.schema.fields import Range

SMALLEST = 2.0**-126
"""The smallest normal fp32 number. Arithmetic may round smaller ones to 0, and then divide by 0."""


class FieldError(DataError):
    """A mapping does not match its dataclass."""


class _Bad(Exception):
    """One value is wrong. `_value` catches it and continues with the others."""


def build[T](cls: type[T], mapping: Any, where: str) -> T:
    """An instance of dataclass `cls` from `mapping`. where: the dotted key of the mapping in its recipe.

    Raises FieldError with a line for each problem: key or value, its place, and the nearest key, range or choices.
    """
    problems: list[str] = []
    result = _dataclass(cls, mapping, where, problems)
    if problems:
        raise FieldError("\n".join(problems))
    return typing.cast(T, result)


def defaults_of(cls: type) -> dict[str, Any]:
    """A dataclass's defaults as a plain mapping of every field, also in nested groups; `???` for a field without a default."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = defaults_of(typing.cast(type, hints[field.name]))
        elif field.default is not dataclasses.MISSING:
            values[field.name] = list(field.default) if isinstance(field.default, tuple) else field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        else:
            values[field.name] = "???"
    return values


def differing(value: Any) -> dict[str, Any]:
    """The fields of an instance that differ from the defaults, as a plain mapping: its shortest form as YAML."""
    own: dict[str, Any] = {}
    for name, default in defaults_of(type(value)).items():
        item = getattr(value, name)
        if dataclasses.is_dataclass(item):
            own |= {name: inner} if (inner := differing(item)) else {}
        elif isinstance(item, dict) and all(map(dataclasses.is_dataclass, item.values())):
            own |= {name: {key: differing(one) for key, one in item.items()}} if item else {}
        elif isinstance(item, tuple):
            plain = [differing(one) if dataclasses.is_dataclass(one) else one for one in item]
            own |= {name: plain} if plain != default else {}
        elif item != default:
            own[name] = item
    return own


def type_at(cls: type, key: str) -> Any:
    """Type of the field at a dotted key; None without one. It is X for a field `X | None` and an item of dict[str, X]."""
    kind: Any = cls
    for name in key.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        else:
            return None
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next((inner for inner in typing.get_args(kind) if inner is not type(None)), None)
    return kind


def field_docs(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass, those of its bases included, one line each, in order."""
    docs: dict[str, str] = {}
    for base in cls.__bases__:
        if dataclasses.is_dataclass(base):
            docs |= field_docs(base)
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[statement.target.id] = " ".join(text.value.split())
    return docs


def _dataclass(cls: type, mapping: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(mapping, Mapping):
        problems.append(f"{where or 'recipe'}={mapping!r} is a {_kind(mapping)}, not a group of fields.")
        return None
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"Did you mean {_at(where, near[0])}?" if near else f"Use one of {', '.join(fields)}."
            problems.append(f"{_at(where, key)} is not a field. {hint}")
    for name, field in fields.items():
        if name in mapping and mapping[name] != "???":
            values[name] = _value(hints[name], mapping[name], _at(where, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_at(where, name)} is missing: {field_docs(cls).get(name, 'it has no default.')}")
    return None if problems else cls(**values)


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` in the type `hint`, or None with a line in `problems`."""
    bounds = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extras = typing.get_args(hint)
        bounds = next((extra for extra in extras if isinstance(extra, Range)), None)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and type(None) in arguments:
        if value is None:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _value(inner, value, where, problems)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, where, problems)
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{where}={value!r} is a {_kind(value)}, not a group.")
            return None
        return {str(key): _named(arguments[1], value, key, where, problems) for key in value}
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            problems.append(f"{where}={value!r} is a {_kind(value)}, not a list.")
            return None
        items = [_value(arguments[0], item, f"{where}[{index}]", problems) for index, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    try:
        if origin is typing.Literal:
            return _choice(arguments, value)
        number = _scalar(hint, value)
        if bounds is not None and not bounds.admits(number):
            raise _Bad(f"is out of range. Use a value {bounds}.")
        if isinstance(number, int) and not -(2**63) <= number < 2**63:  # counts are stored in 64-bit arrays and tensors
            raise _Bad(f"is out of range. Use a value < {2**63}.")
        return number
    except _Bad as problem:
        problems.append(f"{where}={value!r} {problem}")
        return None


def _named(hint: Any, group: Mapping[Any, Any], key: Any, where: str, problems: list[str]) -> Any:
    """One item of a named group. A mistyped name is a new item, mostly without required fields: suggest the nearest name."""
    before = len(problems)
    item = _value(hint, group[key], _at(where, key), problems)
    near = difflib.get_close_matches(str(key), [str(other) for other in group if other != key], n=1)
    if near and any(" is missing: " in line for line in problems[before:]):
        problems[-1] += f" Or did you mean {_at(where, near[0])}?"
    return item


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    if value in choices and not isinstance(value, bool):
        return value
    near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise _Bad(f"is not a choice. {hint}Use one of: {', '.join(map(str, choices))}.")


def _scalar(kind: Any, value: Any) -> Any:
    if kind == int | float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (float, int | float):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _finite(value)
        if isinstance(value, str):
            try:
                return _finite(float(value))
            except ValueError:
                pass
        raise _Bad(f"is a {_kind(value)}, not a number.")
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    names = {int: "a whole number", str: "a text", bool: "true or false"}
    assert kind in names, f"fields of type {kind} are not understood"
    raise _Bad(f"is a {_kind(value)}, not {names[kind]}.")


def _finite(value: int | float) -> float:
    """A number as a float. Refused are infinities, and numbers that fp32 may round to 0: no field has a use for them."""
    try:
        number = float(value)
    except OverflowError:  # a whole number above 1.8e308
        number = math.inf
    if not math.isfinite(number):
        raise _Bad("is not a finite number.")
    if 0 < abs(number) < SMALLEST:
        raise _Bad(f"is too close to 0 for fp32. Use 0, or at least {SMALLEST:.2g} from it.")
    return number


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true/false", int: "whole number", float: "number with a fraction", str: "text", dict: "group"}
    return names.get(type(value), type(value).__name__)


def _at(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)

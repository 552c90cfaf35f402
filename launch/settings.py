"""Builds frozen dataclasses from YAML and reports what is wrong in one line that names file, line and key.

YAML is composed to nodes rather than loaded, so that each key keeps its line, a duplicate key is an error, and a number
that YAML 1.1 takes for text (5e-4) still reaches a float field. Every mistake of a document is found before the first
is reported.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

import yaml
from yaml.reader import ReaderError

T = TypeVar("T")


@dataclass
class Node:
    """A YAML value that remembers where it stands."""

    place: str
    """`file:line`, or the override that set it."""
    value: Any
    """dict[str, Node], list[Node], or a plain scalar."""
    text: str | None = None
    """A scalar as it was written; None for mappings and lists."""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of a mapping: the place of each key."""

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


class Problems:
    """Collects mistakes; `check` raises the first as one line."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, place: str, key: str, message: str) -> None:
        """Note that `key`, written at `place`, is wrong."""
        self.found.append(f"{place}: {key}: {message}" if key else f"{place}: {message}")

    def check(self) -> None:
        """Raises: ValueError with the first mistake and the number of the others."""
        if self.found:
            more = len(self.found) - 1
            raise ValueError(self.found[0] + (f" (and {more} more)" if more else ""))


def parse(text: str, place: Callable[[int], str]) -> Node:
    """Compose one YAML document.

    Args:
        text: the document.
        place: names a 1-based line, for instance `lambda line: f"demo.yaml:{line}"`.

    Raises:
        ValueError: a syntax error, a duplicate or non-text key, several documents.
    """
    try:
        loader = yaml.SafeLoader(text)
    except ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ValueError(f"{place(line)}: not valid YAML: character {chr(int(error.character))!r}") from None
    try:
        root = loader.get_single_node()
        if root is None:
            return Node(place(1), None, "")
        return _convert(root, loader, place, depth=0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{place(mark.line + 1 if mark else 1)}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ValueError(f"{place(1)}: nested too deeply") from None
    finally:
        loader.dispose()


def _convert(node: yaml.Node, loader: yaml.SafeLoader, place: Callable[[int], str], depth: int) -> Node:
    here = place(node.start_mark.line + 1)
    if depth > 50:
        raise ValueError(f"{here}: nested too deeply")
    if isinstance(node, yaml.MappingNode):
        mapping = Node(here, {})
        for key_node, value_node in node.value:
            key_place = place(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"{key_place}: a key must be plain text")
            key = key_node.value
            if key in mapping.value:
                raise ValueError(f"{key_place}: {key}: set twice, first at {mapping.keys[key]}")
            mapping.value[key] = _convert(value_node, loader, place, depth + 1)
            mapping.keys[key] = key_place
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return Node(here, [_convert(item, loader, place, depth + 1) for item in node.value])
    try:
        value = loader.construct_object(node)
    except ValueError as error:  # for instance the date 2024-13-01
        raise ValueError(f"{here}: {node.value}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError):  # what PyYAML comes to with `!!bool foo`
        raise ValueError(f"{here}: {node.value}: is no {node.tag.rpartition(':')[2]}") from None
    return Node(here, value, node.value)


def build(cls: type[T], node: Node, where: str, problems: Problems | None = None) -> T:
    """Build the dataclass `cls` from a mapping.

    Args:
        cls: a dataclass; fields may be int, float, bool, str, Literal, Any, unions, tuples, lists, dicts, dataclasses.
        node: the mapping; an empty value takes every default.
        where: the path of keys to it, for messages (`train`); "" at the top.
        problems: collects mistakes when given (the result is then of no use); otherwise they are raised.

    Raises:
        ValueError: one line that names place, key and the valid choices.
    """
    collected = Problems() if problems is None else problems
    result = _Builder(collected).dataclass(cls, node, where)
    if problems is None:
        collected.check()
    return typing.cast(T, result)


def unknown_key(name: str, valid: Iterable[str]) -> str:
    """What to say of a key that does not exist: the likely meaning and all valid keys."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, 1, 0.6)
    hint = f" did you mean {near[0]}?" if near else ""
    return f"unknown key;{hint} valid: {', '.join(names)}"


_BAD: Any = object()


class _Mismatch(Exception):
    """The value is not of the wanted type; the message says what was wanted."""


class _Builder:
    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    def dataclass(self, cls: type, node: Node, where: str) -> Any:
        before = len(self.problems.found)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        if node.value is None:
            node = Node(node.place, {})
        if not isinstance(node.value, dict):
            self.problems.add(node.place, where, f"must be a mapping of keys to values, is {describe(node)}")
            return _BAD
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for key, child in node.value.items():
            path = join(where, key)
            if key not in fields:
                self.problems.add(node.keys[key], path, unknown_key(key, fields))
                continue
            values[key] = self.value(hints[key], child, path, node.keys[key])
        for key, field in fields.items():
            has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            if not has_default and key not in node.value:
                self.problems.add(node.place, join(where, key), "missing")
        if len(self.problems.found) > before:
            return _BAD
        try:
            return cls(**values)
        except ValueError as error:
            key, _, message = str(error).partition(": ")
            if key in fields and message:
                self.problems.add(node.keys.get(key, node.place), join(where, key), message)
            else:
                self.problems.add(node.place, where, str(error))
            return _BAD

    def value(self, hint: Any, node: Node, path: str, place: str) -> Any:
        before = len(self.problems.found)
        try:
            return self._value(hint, node, path)
        except _Mismatch as error:
            if len(self.problems.found) == before:
                self.problems.add(place, path, f"must be {error}, is {describe(node)}")
            return _BAD

    def _value(self, hint: Any, node: Node, path: str) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return node.plain()
        if origin in (Union, types.UnionType):
            return self._union(args, node, path)
        if origin is Literal:
            for choice in args:
                if (node.value == choice and type(node.value) is type(choice)) or node.text == choice:
                    return choice
            raise _Mismatch(_one_of(args))
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.dataclass(hint, node, path)
        if origin in (tuple, list):
            return self._sequence(origin, args, node, path)
        if origin is dict:
            if not isinstance(node.value, dict):
                raise _Mismatch(_name(hint))
            return {key: self.value(args[1], item, join(path, key), node.keys[key]) for key, item in node.value.items()}
        return _scalar(hint, node)

    def _union(self, options: tuple[Any, ...], node: Node, path: str) -> Any:
        # Text matches any scalar, so it is tried last: of `int | str`, 3 is the number.
        for option in sorted(options, key=lambda option: option is str):
            if option is types.NoneType:
                if node.value is None:
                    return None
                continue
            attempt = _Builder(Problems())
            try:
                value = attempt._value(option, node, path)
            except _Mismatch:
                continue
            if attempt.problems.found and isinstance(node.value, dict | list):
                self.problems.found += attempt.problems.found  # of the right shape, wrong inside
                return _BAD
            if not attempt.problems.found:
                return value
        raise _Mismatch(" or ".join(_name(option) for option in options))

    def _sequence(self, origin: type, args: tuple[Any, ...], node: Node, path: str) -> Any:
        if not isinstance(node.value, list):
            raise _Mismatch(_name(origin[args]))  # type: ignore[index]
        kinds = [args[0]] * len(node.value) if origin is list or args[-1] is ... else list(args)
        if len(kinds) != len(node.value):
            raise _Mismatch(f"a list of {len(kinds)}")
        items = [
            self.value(kind, item, f"{path}[{index}]", item.place)
            for index, (kind, item) in enumerate(zip(kinds, node.value, strict=True))
        ]
        return origin(items)


def _scalar(hint: Any, node: Node) -> Any:
    value, text = node.value, node.text
    if text is None:
        raise _Mismatch(_name(hint))
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float) and re.fullmatch(r"[-+]?0[0-9_]+|[-+]?[0-9_]+:.*", text):  # YAML 1.1: base 8 and base 60
        raise _Mismatch(f"{_name(hint)}, in decimals without leading zeros")
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:  # what is counted is counted in 64 bits
            raise _Mismatch("a whole number of 64 bits")
        return value
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value if isinstance(value, int | float) else text)
        except (ValueError, OverflowError):
            raise _Mismatch(_name(hint)) from None
        if number == number and abs(number) != float("inf"):
            return number
    if hint is str and value is not None:
        return text
    raise _Mismatch(_name(hint))


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


def _name(hint: Any) -> str:
    if hint in _NAMES:
        return _NAMES[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _one_of(args)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(option) for option in args)
    if origin in (tuple, list):
        if origin is list or args[-1] is ...:
            return "a list"
        return f"a list of {len(args)}"
    return "a mapping"


def _one_of(choices: tuple[Any, ...]) -> str:
    return "one of " + ", ".join(str(choice) for choice in choices) if len(choices) > 1 else str(choices[0])


def describe(node: Node) -> str:
    """A node in a few words, for messages."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    if node.value is None:
        return "empty"
    text = " ".join((node.text or "").split()) or "''"
    return text if len(text) <= 60 else text[:57] + "..."


def join(where: str, key: str) -> str:
    """`train` and `lr` make `train.lr`."""
    return f"{where}.{key}" if where else key

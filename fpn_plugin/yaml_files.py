"""Reading YAML files without running code that stands in them.

Detectron2 falls back to `yaml.unsafe_load` for files with Python tags, which calls whatever a tag
names. Its own Base-RetinaNet.yaml has such a tag, `!!python/object/apply:eval`, around arithmetic,
which is evaluated here without Python's `eval`.
"""

from __future__ import annotations

import ast
import itertools
import operator
from typing import Any, Iterator, Mapping

import yaml
from detectron2.utils.file_io import PathManager

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_MERGE = "tag:yaml.org,2002:merge"  # the key <<
_STEPS = 100_000  # of one expression: lists can be made inside of each other
_LARGEST, _HIGHEST = 1e6, 64  # base and exponent: a power of whole numbers can fill the memory
_VALUES = 100_000  # in a whole file; a few lines with anchors can stand for any number


class _Loader(yaml.SafeLoader):
    """Plain YAML, and two Python tags that do no harm: tuples and arithmetic."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Copy what `<<` names into a section; yaml keeps each of its keys as often as it comes."""
        super().flatten_mapping(node)
        if len(node.value) > _VALUES:
            raise yaml.constructor.ConstructorError(
                problem=f"a section of more than {_VALUES} keys", problem_mark=node.start_mark
            )


def _tuple(loader: _Loader, node: yaml.SequenceNode) -> tuple:
    return tuple(loader.construct_sequence(node, deep=True))


def _arithmetic(loader: _Loader, node: yaml.Node) -> Any:
    words = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    if len(words) != 1 or not isinstance(words[0], str):
        raise yaml.constructor.ConstructorError(problem="eval takes one text")
    try:
        return evaluate(words[0])
    except ValueError as error:
        problem = f"{error} (no code of a config is run)"
        raise yaml.constructor.ConstructorError(problem=problem) from error


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)
_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _arithmetic)


class _ObjectsLoader(_Loader):
    """The same, with objects of Python as their class's name and their fields: nothing is made."""


def _object(loader: _ObjectsLoader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(
            problem=f"could not determine a constructor for the tag {node.tag!r}",
            problem_mark=node.start_mark,
        )
    content = loader.construct_mapping(node, deep=True)
    return {"_target_": suffix, **{str(key): value for key, value in content.items()}}


_ObjectsLoader.add_multi_constructor("tag:yaml.org,2002:python/object:", _object)


def read_yaml(path: str, objects: bool = False) -> dict[str, Any]:
    """The keys and values of a YAML file; none for an empty file.

    Args:
        objects: whether an object of Python may stand in it, as LazyConfig writes a ShapeSpec: it
            becomes a section of its fields with `_target_`, the name of its class.

    Raises:
        ValueError: naming the file, if it cannot be read, is not YAML, calls code, has a key twice,
            or holds anything else than keys with values.
    """
    try:
        with PathManager.open(path, "r") as stream:
            content = _load(stream, _ObjectsLoader if objects else _Loader)
    # yaml lets the ValueError of a date such as 2000-99-99 through, and others of odd scalars
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {_reason(error)}") from error
    except RecursionError:
        raise ValueError(f"{path}: its lists or sections are nested too deeply") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not keys with values")
    _check_size(content, path)
    return content


class RepeatedKeyError(yaml.constructor.ConstructorError):
    """A section has a key twice."""


def _load(stream: Any, kind: type[_Loader]) -> Any:
    loader = kind(stream)
    try:
        node = loader.get_single_node()
        _refuse_repeated_keys(node)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_repeated_keys(root: yaml.Node | None) -> None:
    """Raise an error if a section has a key twice: yaml keeps the last and drops the others."""
    pending: list[tuple[str, yaml.Node | None]] = [("", root)]
    seen: set[int] = set()  # an anchor's node stands in several places
    while pending:
        place, node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += [(f"{place}[{i}]", value) for i, value in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            name, line = f"{place}.{key.value}" if place else key.value, key.start_mark.line + 1
            if first := lines.get((key.tag, key.value)):
                raise RepeatedKeyError(
                    problem=f"{name} is there already, in line {first}; keep one of them",
                    problem_mark=key.start_mark,
                )
            lines[key.tag, key.value] = line
            pending.append((name, value))


def _reason(error: Exception) -> str:
    """One line, with the place in the file where yaml says it."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        hint = ""
        if "python/" in str(error.problem):
            hint = " (a tag of Python calls code, and no code of a config is run)"
        if isinstance(error, RepeatedKeyError):
            return f"has a key twice{place}: {error.problem}"
        return f"is no plain YAML{place}: {error.problem or error.context}{hint}"
    return f"cannot be read: {str(error).partition(chr(10))[0]}"


def _check_size(content: Any, path: str) -> None:
    """Refuse anchors that expand to very many values, or that contain themselves."""
    pending, count = [content], 0
    while pending:
        value = pending.pop()
        count += 1
        if count > _VALUES:
            raise ValueError(f"{path}: its anchors stand for more than {_VALUES} values")
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, (list, tuple, set)):
            pending += value


def evaluate(text: str) -> Any:
    """The value of arithmetic: numbers, `+ - * / **`, lists, tuples, and `[... for x in ...]`.

    Nothing can be called or looked up in the text.

    Raises:
        ValueError: naming what is not arithmetic.

    Example:
        >>> evaluate("[[x, x * 2 ** (1 / 2)] for x in [32, 64]]")[1][0]
        64
    """
    try:
        return _value(ast.parse(text, mode="eval").body, {}, itertools.count())
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(f"{text!r} is not arithmetic: {error}") from error


def _value(node: ast.expr, names: Mapping[str, Any], steps: Iterator[int]) -> Any:
    if next(steps) > _STEPS:
        raise ValueError(f"it takes more than {_STEPS} steps")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_value(item, names, steps) for item in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.ListComp) and len(node.generators) == 1:
        return _comprehension(node, names, steps)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_number(node.operand, names, steps))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _number(node.left, names, steps), _number(node.right, names, steps)
        if isinstance(node.op, ast.Pow) and (abs(left) > _LARGEST or abs(right) > _HIGHEST):
            raise ValueError(f"{ast.unparse(node)!r} is too large a power")
        result = _OPERATORS[type(node.op)](left, right)
        if isinstance(result, complex):
            raise ValueError(f"{ast.unparse(node)!r} is no real number")
        return result
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")


def _comprehension(node: ast.ListComp, names: Mapping[str, Any], steps: Iterator[int]) -> list[Any]:
    source = node.generators[0]
    items = _value(source.iter, names, steps)
    is_plain = isinstance(source.target, ast.Name) and not source.ifs
    if not is_plain or not isinstance(items, (list, tuple)):
        raise ValueError(f"{ast.unparse(node)!r} is not a list made by 'for <name> in <list>'")
    name = ast.unparse(source.target)
    return [_value(node.elt, {**names, name: item}, steps) for item in items]


def _number(node: ast.expr, names: Mapping[str, Any], steps: Iterator[int]) -> Any:
    value = _value(node, names, steps)
    if type(value) not in (int, float):
        raise ValueError(f"{ast.unparse(node)!r} is not a number")
    return value

"""Arithmetic in a text: numbers, + - * / **, lists, tuples, and lists made by `for … in`."""

from __future__ import annotations

import ast
import itertools
import operator
from typing import Any, Iterator, Mapping

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_STEPS = 100_000  # lists made inside of each other
_LARGEST, _HIGHEST = 1e6, 64  # base and exponent: a power of whole numbers can fill the memory


def evaluate(text: str) -> Any:
    """The value of a text; nothing can be called or looked up in it.

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
        return _listed(node, names, steps)
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


def _listed(node: ast.ListComp, names: Mapping[str, Any], steps: Iterator[int]) -> list[Any]:
    source = node.generators[0]
    items = _value(source.iter, names, steps)
    if (
        not isinstance(source.target, ast.Name)
        or source.ifs
        or not isinstance(items, (list, tuple))
    ):
        raise ValueError(f"{ast.unparse(node)!r} is not a list made by 'for <name> in <list>'")
    return [_value(node.elt, {**names, source.target.id: item}, steps) for item in items]


def _number(node: ast.expr, names: Mapping[str, Any], steps: Iterator[int]) -> Any:
    value = _value(node, names, steps)
    if type(value) not in (int, float):
        raise ValueError(f"{ast.unparse(node)!r} is not a number")
    return value

"""A registry of names, and errors that say which argument is wrong and what is valid."""

from __future__ import annotations

import difflib
from typing import Callable, Generic, Iterable, Sequence, TypeVar

T = TypeVar("T")


class ArgumentError(ValueError):
    """A bad value of an argument.

    Attributes:
        argument: what the message begins with: the argument's name, and maybe the place in its
            value (`graph[2] (p5), inputs`).
    """

    argument = ""


# how a name of one's own comes to be known
HOW_TO_ADD = "one of your own is known once its file is imported: --import FILE.py"


class UnknownNameError(KeyError):
    """A name that nothing is registered under. Unlike a plain KeyError it prints its message as it
    is.

    Attributes:
        argument: what the message begins with.
    """

    argument = ""

    def __str__(self) -> str:
        return str(self.args[0])


def bad_argument(argument: str, reason: str) -> ArgumentError:
    """The error for a bad value of an argument.

    Args:
        argument: its name, and maybe the place in its value.
        reason: the value and what is valid. Other arguments stand in it `between backquotes`.
    """
    error = ArgumentError(f"{argument}: {reason}")
    error.argument = argument
    return error


def close_name(name: str, choices: Sequence[str], cutoff: float = 0.6) -> str:
    """The choice that a name is nearest to, whatever the case of its letters; "" for none.

    Args:
        cutoff: how much of them must be alike, from 0 to 1.
    """
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else ""


def unknown_name(
    where: str, name: object, choices: Iterable[str], meant: str = "", advice: str = ""
) -> UnknownNameError:
    """The error for a wrong name: where it stands, what it is, what may stand there.

    Args:
        where: the argument, config key, node or registry that holds the name.
        meant: what it may be instead; "" for the nearest of the choices.
        advice: what else can be done: `HOW_TO_ADD` where users may add names.
    """
    known = sorted(choices)
    close = meant or close_name(str(name), known)
    hint = f" (did you mean {close!r}?)" if close else ""
    choice = ", ".join(item or repr(item) for item in known)
    text = f"{where}: unknown name {name!r}{hint}; choose from: {choice}"
    error = UnknownNameError(f"{text}; {advice}" if advice else text)
    error.argument = where
    return error


class Registry(Generic[T]):
    """Names for objects of one kind.

    Args:
        kind: what it holds, as the error message calls it.

    Example:
        >>> SHAPES: Registry[type] = Registry("shape")
        >>> @SHAPES.register("square")
        ... class Square: ...
        >>> SHAPES.get("square") is Square
        True
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._objects: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under `name`; one that is defined again, as by a cell of
        a notebook that is run again, replaces itself.

        Raises:
            ValueError: if another object has the name.
        """

        def enter(obj: T) -> T:
            other = self._objects.get(name)
            if other is not None and _place(other) != _place(obj):
                raise ValueError(
                    f"{self.kind} {name!r} is registered already, as {_place(other)}, so"
                    f" {_place(obj)} needs another name"
                )
            self._objects[name] = obj
            return obj

        return enter

    def get(self, name: str, where: str = "") -> T:
        """The object under `name`.

        Args:
            where: the argument, config key or node that named it, for the error message.

        Raises:
            UnknownNameError: (a KeyError) naming `where`, the name and the choices.
        """
        if name not in self._objects:
            raise unknown_name(where or self.kind, name, self._objects, advice=HOW_TO_ADD)
        return self._objects[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._objects)

    def __contains__(self, name: object) -> bool:
        return name in self._objects


def _place(obj: object) -> str:
    """Where an object was defined."""
    return f"{getattr(obj, '__module__', '')}.{getattr(obj, '__qualname__', obj)}"

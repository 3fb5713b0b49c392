"""What the fuzz tests share: how many examples, values of any kind, and what counts as an answer."""

from __future__ import annotations

import copy
import functools
import os
import traceback
from pathlib import Path
from typing import Any, Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import fpn_plugin

PACKAGE = Path(fpn_plugin.__file__).parent
OURS = (ValueError, KeyError, FileNotFoundError, FileExistsError, ImportError)
# FPN_PLUGIN_FUZZ=20000: a campaign by hand, with that many random examples of each kind
CAMPAIGN = int(os.getenv("FPN_PLUGIN_FUZZ", "0"))


def fuzz_settings(examples: int) -> Callable:
    """The same examples at each run, unless it is a campaign."""
    return settings(
        derandomize=not CAMPAIGN,
        database=None,
        deadline=None,
        max_examples=CAMPAIGN or examples,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


def answer(action: Callable[[], Any], *named: str) -> str:
    """Run an action: "works", or "refused" by an error that this plugin raises itself.

    Args:
        named: of these the message must have one: keys or files.

    Raises:
        AssertionError: for any other end: an error from the depths.
    """
    try:
        action()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raised = Path(last.filename).is_relative_to(PACKAGE) and str(last.line).startswith("raise")
        told = not named or any(name in str(error) for name in named)
        if isinstance(error, OURS) and raised and told:
            return "refused"
        place = f"{last.filename}:{last.lineno}: {last.line}"
        raise AssertionError(f"{type(error).__name__}: {error}\n  in {place}") from error
    return "works"


def mutated(
    draw: st.DrawFn,
    sound: Any,
    actions: st.SearchStrategy[str],
    keys: st.SearchStrategy[str],
    value: Callable[[tuple], Any],
) -> Any:
    """Nested lists and dicts with one to three values replaced, dropped, doubled or added.

    Args:
        sound: is left as it is.
        actions: gives "replace", "drop", "double" or "add".
        keys: of what is added.
        value: what comes to a place, by its path.
    """
    changed = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        found = _places(changed)
        if not found:
            break
        *path, key = draw(st.sampled_from(found))
        node = functools.reduce(lambda inner, part: inner[part], path, changed)
        action = draw(actions)
        if action == "drop":
            del node[key]
        elif action == "double" and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            if action == "add" and isinstance(node, dict):
                key = draw(keys)
            node[key] = copy.deepcopy(value((*path, key)))
    return changed


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside of a value."""
    if not isinstance(value, (dict, list)):
        return []
    found = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found += [(*path, key), *_places(item, (*path, key))]
    return found


NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([16, 24, 32, 64, 10**6, -(10**6), 10**19, 10**320]),
    st.floats(-4, 4),
    st.sampled_from([0.0, -0.0, 1e-9, 1e308, float("nan"), float("inf"), -float("inf")]),
    st.booleans(),
)
WORDS = st.one_of(
    st.sampled_from(
        ["", " ", "auto", "none", "None", "res2", "res5", "p3", "p9", "a.b", "..", "/"]
    ),
    st.text(max_size=8),
)
SCALARS = st.one_of(st.none(), NUMBERS, WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(WORDS, NUMBERS), inner, max_size=3)
    ),
    max_leaves=6,
)

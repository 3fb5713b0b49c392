"""Which level finds objects of which size."""

from __future__ import annotations

from fpn_plugin.analysis.visualize.objects import Thing
from fpn_plugin.analysis.visualize.picture import Shown
from fpn_plugin.analysis.visualize.sizes import MISSED, finders, sizes_table


def thing(x: float, side: float, category: int = 0, score: float = 1.0) -> Thing:
    return Thing((x, 0.0, x + side, side), category=category, score=score)


SMALL, OTHER, LARGE = thing(0, 20), thing(40, 20), thing(100, 100)
FOUND = [
    thing(101, 100, score=0.9),  # LARGE, from level 4
    thing(1, 20, score=0.5),  # SMALL, from level 2
    thing(0, 20, score=0.4),  # SMALL again: it has been found
    thing(40, 20, category=1, score=0.8),  # another class than OTHER
    thing(48, 20, score=0.7),  # its IoU with OTHER is 12 / 28
]
SHOWN = Shown(FOUND, [4, 2, 3, 2, 2], [SMALL, OTHER, LARGE])


def test_each_object_is_found_once_by_the_best_of_its_class() -> None:
    assert finders(SHOWN) == [2, MISSED, 4]
    assert finders(Shown([], [], [SMALL])) == [MISSED]
    assert finders(Shown(FOUND, [None] * 5, [LARGE])) == [None]


def test_the_table_counts_by_the_size_of_the_true_object() -> None:
    table = sizes_table([SHOWN, Shown(FOUND, [4] * 5, None), Shown([], [], [LARGE])])
    assert table is not None and "2 images" in table.note
    assert list(table.header) == ["size", "objects", "level 2", "level 4", "missed"]
    assert [list(row) for row in table.rows] == [
        ["16 to 32 px", "2", "1", "0", "1"],
        ["64 to 128 px", "2", "0", "1", "1"],
    ]


def test_levels_that_nobody_knows_come_last() -> None:
    table = sizes_table([SHOWN, Shown(FOUND[:1], [None], [LARGE])])
    assert table is not None
    assert list(table.header)[2:] == ["level 2", "level 4", "level unknown", "missed"]


def test_without_a_known_truth_there_is_no_table() -> None:
    assert sizes_table([Shown(FOUND, [4] * 5, None)]) is None

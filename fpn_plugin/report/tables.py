"""A table of text, the same for the terminal, Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Collection, Sequence

from tabulate import tabulate


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first columns are aligned left, the others right.

    Attributes:
        left: how many columns are aligned left.
        best: row and column of the cells to stress, each from 0; a terminal does not show it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best: Collection[tuple[int, int]] = ()
    left: int = 1

    def text(self, style: str = "simple") -> str:
        """Format as text; `style` is one of tabulate's formats."""
        rows, header = self.rows, self.header
        if style == "github":
            rows = [[_escape(cell) for cell in row] for row in self._stressed()]
            header = [_escape(cell) for cell in header]
        align = ["left" if i < self.left else "right" for i in range(len(self.header))]
        return tabulate(rows, header, tablefmt=style, colalign=align, disable_numparse=True)

    def _stressed(self) -> list[list[str]]:
        return [
            [f"**{cell}**" if (i, j) in self.best else cell for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]


def _escape(cell: str) -> str:
    """A cell in one line of Markdown, in which a bar would begin the next cell."""
    return " ".join(cell.split()).replace("|", "\\|")

"""A table of text, the same for the terminal, Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from tabulate import tabulate


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first column is aligned left, the others right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def text(self, style: str = "simple") -> str:
        """As text; `style` is one of tabulate's formats."""
        align = ["left", *["right"] * (len(self.header) - 1)]
        return tabulate(
            self.rows, self.header, tablefmt=style, colalign=align, disable_numparse=True
        )

"""What the checks on a dataset find: errors that stop a run, warnings that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["DatasetError", "Findings"]

_ERRORS_SHOWN = 10
_EXAMPLES_SHOWN = 3


class DatasetError(ValueError):
    """A dataset has faults that would stop training, or spoil it or its evaluation."""


@dataclass
class Findings:
    """Collects the faults of one dataset; only as many texts are kept as will be shown.

    Attributes:
        source: the JSON file, which every message names.
        num_errors: how many errors were found.
        errors: the first of them.
        counts: how often each kind of warning was found.
        examples: the first of each kind.
    """

    source: str
    num_errors: int = 0
    errors: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def error(self, message: str) -> None:
        """Note an error."""
        self.num_errors += 1
        if len(self.errors) < _ERRORS_SHOWN:
            self.errors.append(message)

    def warn(self, kind: str, count: int, describe: Callable[[int], str]) -> None:
        """Note ``count`` warnings of one kind; ``describe`` gives the text of the i-th of them."""
        if count:
            self.counts[kind] = self.counts.get(kind, 0) + count
            shown = self.examples.setdefault(kind, [])
            shown += [describe(i) for i in range(min(count, _EXAMPLES_SHOWN - len(shown)))]

    def raise_errors(self) -> None:
        """Raise all errors as one.

        Raises:
            DatasetError: there is at least one.
        """
        if not self.num_errors:
            return
        noun = "error" if self.num_errors == 1 else "errors"
        more = self.num_errors - len(self.errors)
        lines = [f"{self.source}: {self.num_errors} {noun}", *(f"  - {e}" for e in self.errors)]
        raise DatasetError("\n".join(lines + ([f"  … and {more} more"] if more else [])))

    def warning_lines(self) -> list[str]:
        """Return one message per kind of warning, with its count and examples."""
        return [
            f"{self.source}: {count} × {kind}; for example {'; '.join(self.examples[kind])}"
            for kind, count in self.counts.items()
        ]

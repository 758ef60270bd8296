"""How far a sweep is: a bar on a terminal, else a line a point."""

import sys
from collections import Counter
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scenarios import rows, tables
from scenarios.point import Outcome


class Telling:
    """Tells of each point as it ends, and at the end of what workers had to say.

    Args:
        what: name of the sweep.
        total: points; None where nobody knows.
    """

    def __init__(self, what: str, total: int | None) -> None:
        console = tables.console(errors=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeRemainingColumn(), TextColumn("{task.fields[failed]}"))  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=total, failed="")
        self._terminal = console.is_terminal
        self._notes: Counter[str] = Counter()
        self._failed = 0

    def __enter__(self) -> "Telling":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._bar.stop()
        for note, times in self._notes.items():
            more = f" ({times} points)" if times > 1 else ""
            sys.stderr.write(f"warning: {note}{more}\n")

    def tell(self, outcome: Outcome) -> None:
        """A point has ended."""
        self._notes.update(dict.fromkeys(outcome.notes, 1))
        self._failed += outcome.status == "failed"
        failed = f"{self._failed} failed" if self._failed else ""
        self._bar.update(self._task, advance=1, failed=failed)
        if outcome.status != "kept" and not self._terminal:
            sys.stderr.write(f"{outcome.status}: {rows.label(rows.choices(outcome.point))}\n")

"""Published figures beside ours: what the benchmarks of papers print. Run by itself: nothing."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from sim.provenance import commit, machine


class Published(NamedTuple):
    """What the paper says of a figure."""

    low: float
    high: float
    prefix: str = ""
    """Before a bound, which `high` is then: "up to" what was found, "below" what is promised."""

    def deviation(self, ours: Sequence[float]) -> str:
        """How far ours are off: of a range, what sticks out, relative to the nearer bound."""
        low, high = min(ours), max(ours)
        if self.prefix == "below" and high < self.high:
            return "inside"
        if self.low == self.high:
            return f"{high / self.high - 1:+.0%}"
        out: list[str] = []
        for name, value in dict(zip(("lowest", "highest"), (low, high), strict=True)).items():
            nearest = min(max(value, self.low), self.high)
            out += [f"{name} {value / nearest - 1:+.0%}"] if value != nearest else []
        return ", ".join(out) or "inside"

    def text(self, form: str) -> str:
        """As the table shows it."""
        return f"{self.prefix} {span((self.low, self.high), form)}".strip()


def at(value: float) -> Published:
    """A figure as it is."""
    return Published(value, value)


def up_to(value: float) -> Published:
    """The largest of several."""
    return Published(value, value, "up to")


def below(value: float) -> Published:
    """A bound that was kept."""
    return Published(value, value, "below")


def span(values: Sequence[float], form: str) -> str:
    """One figure, or the range of several."""
    ends = dict.fromkeys(form.format(one) for one in (min(values), max(values)))
    return " to ".join(ends)


class Report:
    """Rows of the table, and our figures by name."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.figures: dict[str, float] = {}

    def add(
        self, where: str, what: str, published: Published, ours: Sequence[float] | float,
        form: str = "{:.2f}",
    ) -> None:  # fmt: skip
        """A row, and its figures for the JSON line."""
        shown = [ours] if isinstance(ours, int | float) else list(ours)
        if published.prefix == "up to":
            shown = [max(shown)]
        self.rows.append(
            (where, what, published.text(form), span(shown, form), published.deviation(shown))
        )
        name = f"{where} {what}"
        ranged = published.low < published.high
        found = {" low": min(shown), " high": max(shown)} if ranged else {"": shown[-1]}
        for end, value in found.items():
            self.note(name + end, value)

    def note(self, name: str, value: float) -> None:
        """A figure for the JSON line alone."""
        words = re.split(r"[^a-z0-9.]+", name.lower().replace("fig. ", "fig "))
        self.figures["_".join(filter(None, words))] = value

    def shrinks(self, where: str, what: str, before: float, after: float) -> None:
        """A row on something that should become smaller, without a published figure."""
        shown = f"{before:.3f} to {after:.3f}"
        self.rows.append(
            (where, what, "should shrink", shown, "as expected" if after < before else "grows")
        )

    def show(self, title: str, beside: str = "published") -> None:
        """Print the table; `beside` names the column of what ours are compared with."""
        table = Table(title=f"{title}\n{machine()}, commit {commit()}")
        for column in ("where", "what", beside, "ours", "deviation"):
            table.add_column(column, no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        Console(width=140).print(table)

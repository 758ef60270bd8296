"""Tables of ratios: measured points come back, and what lies beyond them is called so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.costs.curve import Curve
from sim.costs.seconds import Seconds
from sim.costs.table import Reading, Table, table

AXIS = st.lists(st.integers(0, 5000), min_size=1, max_size=6, unique=True).map(sorted)
RATIO = st.floats(0.1, 10.0)


@st.composite
def grids(draw: st.DrawFn) -> dict[tuple[int, int, int], float]:
    """Three axes with holes: each point of an axis has its own points behind it."""
    return {
        (a, b, c): draw(RATIO)
        for a in draw(AXIS)
        for b in draw(AXIS)
        for c in draw(AXIS)
    }  # fmt: skip


def of(grid: dict[tuple[int, int, int], float]) -> Table:
    return table((*point, ratio) for point, ratio in grid.items())


@given(grids())
def test_a_measured_point_comes_back_as_it_is(grid: dict[tuple[int, int, int], float]) -> None:
    known = of(grid)
    for point, ratio in grid.items():
        assert known.at(*point) == Reading(ratio, True, True)


@given(grids(), st.tuples(*[st.floats(0, 6000)] * 3))
def test_a_reading_never_leaves_the_range_of_what_was_measured(
    grid: dict[tuple[int, int, int], float], point: tuple[float, float, float]
) -> None:
    found = of(grid).at(*point).ratio
    assert min(grid.values()) - 1e-12 <= found <= max(grid.values()) + 1e-12


@given(st.lists(st.tuples(st.integers(0, 999), RATIO), min_size=1, unique_by=lambda row: row[0]))
def test_beyond_the_grid_the_nearest_ratio_goes_on(rows: list[tuple[int, float]]) -> None:
    known = table(rows)
    low, high = min(rows), max(rows)
    assert known.at(high[0] + 1) == Reading(high[1], False, False)
    assert known.at(low[0] - 0.5) == Reading(low[1], False, False)


def test_between_two_points_a_power_of_the_axis_is_met() -> None:
    """Ratio and axis are both read by their logarithms, the axis of one more than it."""
    known = table([(0, 1.0), (3, 2.0), (15, 8.0)])
    assert known.at(1) == Reading(pytest.approx(2**0.5), True, False)
    assert known.at(7) == Reading(pytest.approx(4.0), True, False)


@given(grids(), st.tuples(*[st.floats(0, 6000)] * 3))
def test_ratios_of_the_inverse_are_the_inverse(
    grid: dict[tuple[int, int, int], float], point: tuple[float, float, float]
) -> None:
    """Whether the model is divided by the measurement or the other way round is the same."""
    inverse = of({at: 1 / ratio for at, ratio in grid.items()})
    assert inverse.at(*point).ratio == pytest.approx(1 / of(grid).at(*point).ratio)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_a_measurement_that_took_no_time_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"point \(1, 2\) took no time"):
        table([(1, 1, 0.5), (1, 2, ratio)])


def test_a_point_that_is_measured_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"point \(1, 2\) is given twice; keep one"):
        table([(1, 2, 0.5), (1, 2, 0.6)])


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="a table without measurements cannot answer"):
        table([])


@pytest.mark.parametrize(
    ("reading", "part"),
    [
        (Reading(2.0, True, True), "measured"),
        (Reading(2.0, True, False), "interpolated"),
        (Reading(2.0, False, False), "extrapolated"),
    ],
)
def test_seconds_are_kept_apart_by_how_they_were_read(reading: Reading, part: str) -> None:
    assert reading.seconds(0.25) == Seconds(**{part: 0.5})


def test_what_stands_in_for_something_else_is_extrapolated() -> None:
    seconds = Seconds(1.0, 2.0, 4.0, 8.0)
    assert seconds.as_extrapolated() == Seconds(0.0, 0.0, 7.0, 8.0)
    assert seconds.plus(seconds.times(2)).total == pytest.approx(45.0)


KNOTS = st.lists(
    st.tuples(st.integers(1, 5000), st.floats(0, 1)), min_size=1, unique_by=lambda row: row[0]
).map(sorted)


@given(KNOTS, st.integers(1, 6000), st.integers(1, 300), st.integers(1, 60), st.floats(0, 1))
def test_a_stretch_of_a_curve_is_its_points_bit_for_bit(
    knots: list[tuple[int, float]], first: int, step: int, count: int, fixed_s: float
) -> None:
    curve = Curve([k for k, _ in knots], [v for _, v in knots], 1e-4)
    points = [fixed_s + curve.at(first + step * i) for i in range(count)]
    assert curve.run(fixed_s, first, step, count) == points


@given(KNOTS)
def test_a_curve_goes_through_its_knots_and_is_flat_before_them(
    knots: list[tuple[int, float]],
) -> None:
    curve = Curve([k for k, _ in knots], [v for _, v in knots], 0.5)
    assert [curve.at(k) for k, _ in knots] == pytest.approx([v for _, v in knots])
    assert curve.at(knots[0][0] / 2) == knots[0][1]
    assert curve.at(knots[-1][0] + 2) == pytest.approx(knots[-1][1] + 1.0)

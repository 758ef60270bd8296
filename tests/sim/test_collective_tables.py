"""Answers from tables of collectives: exact at points, monotone between, honest of their source."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator
from scipy.optimize import nnls

from hardware_models.parts import load_node
from sim.costs.collective_costs import Fallback
from sim.costs.collective_csv import read_apex, read_vidur
from sim.costs.collective_tables import (
    CollectiveTable,
    Curve,
    Estimate,
    Measured,
    Source,
    fit_alpha_beta,
)
from sim.costs.link_collectives import Library, LinkCollectives, fit_library
from sim.costs.monotone import monotone_cubic

SIZES = [2.0**i for i in range(10, 20)]


def rows(operation="all_reduce", ranks=8, dtype="bf16", nodes=1, latency_s=1e-5, s_per_byte=1e-9):
    return [
        Measured(operation, dtype, ranks, nodes, size, latency_s + s_per_byte * size)
        for size in SIZES
    ]


def table(measured=None, **options):
    return CollectiveTable(measured or rows(), "bf16", name="a table", **options)


def test_a_measured_point_is_answered_as_it_was_measured():
    for row in rows():
        got = table().seconds("all_reduce", 8, row.payload_bytes)
        assert got == Estimate(row.seconds, Source.measured)


def test_repeated_rows_count_as_their_median():
    repeated = [row._replace(seconds=row.seconds * k) for row in rows() for k in (1, 1.1, 50)]
    got = table(repeated).seconds("all_reduce", 8, 1024.0)
    assert got.seconds == pytest.approx(1.1 * rows()[0].seconds)


def test_between_points_it_interpolates_and_says_so():
    for low, high in pairwise(rows()):
        got = table().seconds("all_reduce", 8, math.sqrt(low.payload_bytes * high.payload_bytes))
        assert got.source is Source.interpolated
        assert low.seconds < got.seconds < high.seconds


@pytest.mark.parametrize("payload", [0.0, 1.0, 2.0**25])
def test_outside_it_follows_latency_and_bandwidth_from_the_nearest_point(payload):
    got = table().seconds("all_reduce", 8, payload)
    assert got.source is Source.extrapolated
    assert got.seconds == pytest.approx(1e-5 + 1e-9 * payload)


def test_extrapolation_meets_the_grid_without_a_jump():
    bent = [
        row._replace(seconds=row.seconds * (1.5 if i > 6 else 1)) for i, row in enumerate(rows())
    ]
    curve = table(bent)
    for edge in (SIZES[0], SIZES[-1]):
        at = curve.seconds("all_reduce", 8, edge).seconds
        for payload in (edge * (1 - 1e-9), edge * (1 + 1e-9)):
            assert curve.seconds("all_reduce", 8, payload).seconds == pytest.approx(at)


def test_a_stand_in_is_slower_by_the_bytes_alone_and_always_extrapolated():
    half = table(bandwidth_ratio=0.5)
    for payload in (0.0, 1024.0, 5000.0, 2.0**25):
        got = half.seconds("all_reduce", 8, payload)
        assert got.source is Source.extrapolated
        assert got.seconds == pytest.approx(1e-5 + 2e-9 * payload, rel=1e-3)
    assert table(bandwidth_ratio=1.0).seconds("all_reduce", 8, 1024.0).source is Source.extrapolated


def test_one_rank_takes_no_time():
    assert table().seconds("all_reduce", 1, 1e6).seconds == 0


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (("gossip", 8, 1.0), r"a table has no operation 'gossip' in bf16; there are: all_reduce"),
        (("all_reduce", 6, 1.0), r"num_ranks=6 on num_nodes=1; there are.*: 8 on 1, 8 on 2"),
        (("all_reduce", 8, 1.0, 4), r"num_ranks=8 on num_nodes=4; there are"),
        (("all_reduce", 8, -1.0), r"payload_bytes=-1.0 must be zero or more and finite"),
        (("all_reduce", 8, float("nan")), r"payload_bytes=nan"),
        (("all_reduce", 8, float("inf")), r"payload_bytes=inf"),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(question, message):
    with pytest.raises(ValueError, match=message):
        table([*rows(), *rows(nodes=2)]).seconds(*question)


def test_a_dtype_without_measurements_is_refused():
    with pytest.raises(ValueError, match=r"a table has no dtype 'fp8'; there are: bf16, int8"):
        CollectiveTable([*rows(), *rows(dtype="int8")], "fp8", name="a table")


def test_a_single_stray_row_makes_no_curve():
    stray = Measured("all_reduce", "bf16", 1024, 1, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"num_ranks=1024 on num_nodes=1; there are.*: 8 on 1$"):
        table([*rows(), stray]).seconds("all_reduce", 1024, 1.0)


def test_where_the_table_ends_the_fallback_answers_in_its_own_name():
    both = Fallback(table(), LinkCollectives(load_node("h100_sxm_x8")))
    assert both.seconds("all_reduce", 8, 1024.0).source is Source.measured
    assert both.seconds("all_reduce", 4, 1024.0).source is Source.datasheet
    assert both.seconds("send_recv", 2, 1024.0).source is Source.datasheet


@given(st.lists(st.tuples(st.floats(0.01, 3), st.floats(-5, 5)), min_size=2, max_size=12))
def test_the_monotone_cubic_is_scipys(steps):
    x, y = np.cumsum([step for step, _ in steps]), np.array([height for _, height in steps])
    ours = np.array(monotone_cubic(x, y)).T
    inside = np.linspace(x[0], x[-1], 50)
    i = np.clip(np.searchsorted(x, inside, "right") - 1, 0, len(x) - 2)
    t = inside - x[i]
    got = ((ours[0, i] * t + ours[1, i]) * t + ours[2, i]) * t + ours[3, i]
    assert got == pytest.approx(PchipInterpolator(x, y)(inside), rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(1e-6, 1e-2), min_size=2, max_size=12))
def test_the_fit_of_latency_and_bandwidth_is_scipys(seconds):
    payload = np.array([2.0**i for i in range(len(seconds))])
    matrix = np.stack([1 / np.array(seconds), payload / np.array(seconds)], axis=1)
    best = nnls(matrix, np.ones(len(seconds)))[1]
    fit = fit_alpha_beta(payload.tolist(), seconds)
    error = [fit.seconds(size) / taken - 1 for size, taken in zip(payload, seconds, strict=True)]
    assert min(fit.latency_s, fit.s_per_byte) >= 0
    assert np.linalg.norm(error) == pytest.approx(best, rel=1e-6, abs=1e-9)


@given(st.lists(st.floats(1e-6, 1e-2), min_size=3, max_size=len(SIZES)))
def test_a_curve_stays_between_its_neighbouring_points(seconds):
    curve = Curve(zip(SIZES, seconds, strict=False))
    for low, high in pairwise(range(len(seconds))):
        ends = sorted((seconds[low], seconds[high]))
        for share in (0.1, 0.5, 0.9):
            payload = SIZES[low] ** (1 - share) * SIZES[high] ** share
            assert ends[0] * (1 - 1e-9) <= curve.at(payload).seconds <= ends[1] * (1 + 1e-9)


def test_a_library_is_recovered_from_what_it_did():
    node, library = load_node("a100_80g_x8"), Library(5e-6, 2e-6, 0.75)
    cost = LinkCollectives(node, library)
    measured = [
        Measured(op, "bf16", ranks, 1, size, cost.seconds(op, ranks, size).seconds)
        for op in ("all_reduce", "all_gather", "all_to_all")
        for ranks in (2, 4, 8)
        for size in (1e3, 1e6, 1e9)
    ]
    found = fit_library(node, measured)
    assert found.launch_s == pytest.approx(library.launch_s)
    assert found.step_s == pytest.approx(library.step_s)
    assert found.bandwidth_share == pytest.approx(library.bandwidth_share)


def test_apex_files_are_read_in_their_units(tmp_path):
    head = "gpu,num_nodes,num_gpus_per_node,dtype,size(kb),time(us)\n"
    (tmp_path / "alltoall.csv").write_text(head + "X,1,8,half,0,15\nX,2,4,half,4,20\n")
    assert read_apex(tmp_path) == [Measured("all_to_all", "half", 8, 2, 4096.0, 20 * 1e-6)]


def test_vidur_files_are_read_in_their_units(tmp_path):
    head = "time_stats.send_recv.median,num_workers,size,devices_per_node\n"
    (tmp_path / "send_recv.csv").write_text(head + "0.012,2,2048,1\n0.5,2,4096,2\n")
    assert read_vidur(tmp_path) == [
        Measured("send_recv", "half", 2, 2, 2048.0, pytest.approx(12e-6)),
        Measured("send_recv", "half", 2, 1, 4096.0, pytest.approx(500e-6)),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gossip.csv", "", r"gossip.csv: the name of a file says its operation; use one of all_r"),
        ("all_reduce.csv", "num_nodes\n1\n", r"line 2: no column 'size\(kb\)'; there are: num_no"),
        ("all_reduce.csv", "size(kb)\nmany\n", r"line 2: size\(kb\)='many' must be a finite numb"),
        ("all_reduce.csv", "size(kb)\n1\n-3\n", r"line 2: no column 'num_nodes'"),
        ("all_reduce.csv", "size(kb),num_nodes\n1,0\n", r"num_nodes='0' must be.*of 1 or more"),
        ("all_reduce.csv", "size(kb),num_nodes\n1,\n", r"line 2: num_nodes is empty; complete"),
        ("readme.txt", "", r"holds no .csv file"),
    ],
)
def test_a_bad_file_is_named_by_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_apex(tmp_path)

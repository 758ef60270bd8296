"""What is refused before a run, and what a workload adds up to."""

from collections.abc import Iterator

import numpy as np
import pytest

from sim.workload.base import CHUNK_ROWS, RequestColumns, Workload
from sim.workload.poisson import Poisson
from sim.workload.recorded import replayed
from sim.workload.source import check

TOKENS = {"input_tokens": 100, "output_tokens": 20}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], [], []), "not empty"),
        (([0.0], [1, 2], [1]), "equally long"),
        (([0.0], [0], [1]), r"prompt_tokens\[0\]=0 must be at least 1"),
        (([1.0, 0.5], [1, 1], [1, 1]), r"arrival_s\[1\]=0.5 must be"),
        (([-1.0], [1], [1]), r"arrival_s\[0\]=-1.0 must be"),
    ],
)
def test_recorded_columns_out_of_range_are_refused(columns: list[list], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replayed(*columns)


def test_check_adds_up_the_workload() -> None:
    totals = check(replayed([0.0, 2.0], [10, 20], [3, 4]), 0, 24)
    assert totals == (2, 30, 7, 0, 2.0, 0)


def test_check_names_the_request_that_cannot_fit() -> None:
    workload = replayed([0.0, 1.0], [10, 20], [3, 5])
    message = r"request 1 needs 20 prompt \+ 5 output = 25 tokens; at most 24 fit; shorten it"
    with pytest.raises(ValueError, match=message):
        check(workload, 0, 24)


def test_check_refuses_an_empty_workload() -> None:
    with pytest.raises(ValueError, match="brings 0 requests and must bring at least 1"):
        check(Poisson(rate_per_s=1e-9, duration_s=1.0, **TOKENS), 0, 4096)


class _Broken(Workload):
    def __init__(self, arrival_s: list[float], prompt_tokens: list[int]) -> None:
        self._columns = (np.array(arrival_s), np.array(prompt_tokens), np.ones(2, dtype=np.int64))

    def columns(self, seed: int, chunk_rows: int = CHUNK_ROWS) -> Iterator[RequestColumns]:
        yield RequestColumns(*self._columns)


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (_Broken([2.0, 1.0], [1, 1]), r"request 1 has arrival_s=1.0; arrivals must"),
        (_Broken([0.0, float("nan")], [1, 1]), r"request 1 has arrival_s=nan"),
        (_Broken([0.0, 1.0], [1, 0]), r"request 1 has prompt_tokens=0"),
    ],
)
def test_check_holds_any_workload_to_the_contract(workload: Workload, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(workload, 0, 4096)

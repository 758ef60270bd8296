"""Whatever breaks the contract of retrieved documents is named by request, value, rule, way out."""

import numpy as np
import pytest

from sim.workload.base import RequestColumns
from sim.workload.knowledge import Documents, check_retrieved

CORPUS = Documents(np.array([10, 20, 30]), system_tokens=5)
GOOD = (((2,), (1, 0)), 36)


def _columns(*requests: tuple[tuple[tuple[int, ...], ...], int]) -> RequestColumns:
    count = len(requests)
    return RequestColumns(
        np.zeros(count),
        np.array([prompt for _, prompt in requests], np.int64),
        np.ones(count, np.int64),
        retrieved=[stages for stages, _ in requests],
    )


def test_requests_that_keep_the_contract_pass() -> None:
    check_retrieved(_columns(GOOD, (((0, 1, 2),), 66), (((0,), (2, 0), (2,)), 500)), CORPUS)
    check_retrieved(_columns(), CORPUS)


@pytest.mark.parametrize(
    ("stages", "prompt", "message"),
    [
        ((), 99, r"retrieved=\(\), which must have one stage at least; give it"),
        (((0,), ()), 99, r"an empty list of documents, which must name one at least; leave"),
        (((0, 1, 0), (1,)), 99, r"the list \(0, 1, 0\), which must name no document twice; keep"),
        (((0, 3), (1,)), 99, r"document 3, which must be from 0 to 2; number"),
        (((0, -1), (1,)), 99, r"document -1, which must be from 0 to 2; number"),
        (((0, 2), (1, 0)), 35, r"prompt_tokens=35, which must be at least 36: .*; add them up"),
    ],
)
def test_a_request_that_breaks_the_contract_is_named(
    stages: tuple[tuple[int, ...], ...], prompt: int, message: str
) -> None:
    with pytest.raises(ValueError, match="request 71 has " + message):
        check_retrieved(_columns(GOOD, (stages, prompt), GOOD), CORPUS, start=70)


def test_a_chunk_without_documents_is_refused() -> None:
    none = RequestColumns(np.zeros(2), np.array([99, 99]), np.array([1, 1]))
    with pytest.raises(ValueError, match=r"requests 4 to 5 have retrieved documents for none .*;"):
        check_retrieved(none, CORPUS, start=4)
    some = RequestColumns(np.zeros(2), np.array([99, 99]), np.array([1, 1]), retrieved=[((1,),)])
    with pytest.raises(ValueError, match=r"for those of 1 and must have them for all"):
        check_retrieved(some, CORPUS)

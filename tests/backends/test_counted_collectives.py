"""Collectives give what a plain computation over the same tensors gives, and count every byte."""

import pytest
import torch
from rank_work import everything, in_halves, over_a_slow_link, tensor_of

from backends.collectives import Collectives, Tally
from backends.emulated_link import EmulatedLink
from backends.ranks import run_ranks

ELEMENT_BYTES = 8


def uneven_rows(size):
    """From i to j i + 2 j rows: none, one and many."""
    return [[i + 2 * j for j in range(size)] for i in range(size)]


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request):
    return run_ranks(everything, request.param, (uneven_rows(request.param),))


def test_results_equal_a_plain_reference(ranks):
    size = len(ranks)
    given = [tensor_of(rank, 2 * size) for rank in range(size)]
    total = torch.stack(given).sum(0)
    counts = uneven_rows(size)
    parts = [tensor_of(i, sum(counts[i]), seed=1).split(counts[i]) for i in range(size)]
    for rank, found in enumerate(ranks):
        expected = {
            "all_reduce": total,
            "reduce_scatter": total[2 * rank : 2 * rank + 2],
            "all_gather": torch.cat(given),
            "all_to_all": torch.cat([one[2 * rank : 2 * rank + 2] for one in given]),
            "uneven": torch.cat([part[rank] for part in parts]),
            "broadcast": given[-1],
            "receive": given[(rank - 1) % size],
        }
        if size == 1:
            del expected["receive"]
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} at rank {rank}"


def test_bytes_are_counted_exactly_and_warming_up_counts_nothing(ranks):
    size = len(ranks)
    whole = 2 * size * 3 * ELEMENT_BYTES
    for rank, found in enumerate(ranks):
        uneven = sum(uneven_rows(size)[rank]) * 3 * ELEMENT_BYTES
        expected = [
            ("even", "all_to_all", rank, -1, 1, whole),
            ("part", "reduce_scatter", rank, -1, 1, whole),
            ("sum", "all_reduce", rank, -1, 1, whole),
            ("uneven", "all_to_all", rank, -1, 1, uneven),
            ("whole", "all_gather", rank, -1, 1, whole),
        ]
        if size > 1:
            expected.append(("ring", "send_receive", rank, (rank + 1) % size, 1, whole))
        if rank == size - 1:
            expected.append(("from_last", "broadcast", rank, -1, 1, whole))
        assert found["sent"] == sorted(expected)


def test_groups_of_a_part_of_the_ranks_do_not_mix():
    assert [float(total) for total in run_ranks(in_halves, 4)] == [3.0, 3.0, 12.0, 12.0]


def test_an_emulated_link_delays_deliveries_and_leaves_the_core_alone():
    latency_s, transfer_s = 0.2, 0.1
    first, second = run_ranks(over_a_slow_link, 2, (latency_s,))
    assert second["values"] == [0.0, 7.0]
    # The second message leaves when the first has left; its latency overlaps with the other's.
    assert second["waits"][0] >= latency_s + transfer_s - 0.05
    assert second["waits"][1] >= latency_s + 2 * transfer_s - 0.05
    assert first["waits"][0] < second["waits"][0], "a sender goes on"
    assert first["sum"] == second["sum"] == 1.0
    assert first["all_reduce_s"] >= 2 * latency_s + transfer_s
    assert max(first["busy_s"], second["busy_s"]) < 0.5 * second["waits"][1]


@pytest.mark.parametrize(
    ("operation", "ranks", "seconds"),
    [
        ("all_reduce", 4, 6 * 1e-3 + 6 * 1000 / 1e6),
        ("reduce_scatter", 4, 3 * 1e-3 + 3 * 1000 / 1e6),
        ("all_gather", 4, 3 * 1e-3 + 3 * 4000 / 1e6),
        ("all_to_all", 4, 3 * 1e-3 + 3 * 1000 / 1e6),
        ("broadcast", 4, 2 * 1e-3 + 2 * 4000 / 1e6),
        ("all_reduce", 1, 0.0),
        ("broadcast", 1, 0.0),
    ],
)
def test_closed_forms_of_an_emulated_link(operation, ranks, seconds):
    link = EmulatedLink(latency_s=1e-3, bandwidth_bytes_per_s=1e6)
    assert link.seconds(operation, 4000, ranks) == pytest.approx(seconds)


@pytest.mark.parametrize(("latency_s", "bandwidth"), [(-1.0, 1e9), (float("nan"), 1e9), (0.0, 0.0)])
def test_an_impossible_link_is_refused(latency_s, bandwidth):
    with pytest.raises(ValueError, match="must be"):
        EmulatedLink(latency_s=latency_s, bandwidth_bytes_per_s=bandwidth)


def refusals(rank, size):
    """The messages of what one rank may not ask."""
    messages = []
    group = Collectives(range(size), Tally(rank))
    odd = torch.ones(2 * size + 1, 3)
    for ask in (
        lambda: group.reduce_scatter(odd, "odd"),
        lambda: group.all_to_all(odd, "odd"),
        lambda: group.all_to_all(odd, "odd", [1] * size, [1] * size),
        lambda: group.all_to_all(odd, "odd", [1] * size),
        lambda: Collectives([0, 0], Tally(rank)),
        lambda: Collectives([0, size], Tally(rank)),
        lambda: group.send(odd, "odd", rank),
        lambda: group.receive(odd, size),
    ):
        try:
            ask()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages, group.tally.sent()


def test_what_does_not_divide_is_refused_before_anything_is_sent():
    for messages, sent in run_ranks(refusals, 2):
        assert "5 rows must divide among 2 ranks" in messages[0]
        assert "5 rows must divide among 2 ranks" in messages[1]
        assert "adding up to the 5 rows" in messages[2]
        assert "give both" in messages[3]
        assert "distinct ranks of 0 to 1" in messages[4]
        assert "distinct ranks of 0 to 1" in messages[5]
        assert "must be that of another rank" in messages[6]
        assert "place 2 must be" in messages[7]
        assert sent == []

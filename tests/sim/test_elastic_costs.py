"""Costs of groups of instances: closed forms, and vectors that equal one round after another."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.parts import load_gpu, load_scaling
from hardware_models.scaling import DecodeScaling, PrefillScaling, ScalingBase
from sim.costs.elastic import DecodeWork, ElasticCost, Scaled
from sim.costs.elastic_kernels import Exchange, KernelGroups
from sim.costs.kernel_cost import KernelCost
from sim.costs.kernel_model import KernelModel
from sim.costs.roofline import RooflineKernels
from sim.costs.scaled import ScaledIteration
from sim.elastic_profile import profiled_base
from sim.models.architecture import load_architecture
from sim.models.work import IterationShape

TP2 = load_scaling("lwm_7b_a800_tp2")
FREE = Exchange(32, 0.0, float("inf"), 0.0, 0.0)


def kernels() -> KernelCost:
    gpu = load_gpu("a800_80g")
    model = KernelModel.of(gpu, gpu.peak.memory_bandwidth_bytes_per_s, "fp16")
    return KernelCost(
        RooflineKernels(load_architecture("lwm_7b"), model, dtype_bytes=2, kv_dtype_bytes=2)
    )


COSTS: dict[str, ElasticCost] = {
    "scaled": Scaled(TP2), "kernels": KernelGroups(kernels(), Exchange(32, 1e-5, 1e11, 8e3, 2e4)),
}  # fmt: skip


def works() -> st.SearchStrategy[list[DecodeWork]]:
    def work(members: list[tuple[int, int]]) -> DecodeWork:
        growth = [count for _, count in members]
        if not any(growth):
            growth[0] = 1
        mini = tuple(count for count in growth if count)
        return DecodeWork(mini, tuple(tokens for tokens, _ in members), tuple(growth))

    member = st.tuples(st.integers(0, 200_000), st.integers(0, 200))
    return st.lists(st.lists(member, min_size=1, max_size=4).map(work), min_size=1, max_size=3)


@pytest.mark.parametrize("name", COSTS)
@settings(max_examples=60, deadline=None)
@given(groups=works(), rounds=st.integers(1, 40))
def test_many_rounds_cost_what_they_cost_one_by_one(
    name: str, groups: list[DecodeWork], rounds: int
) -> None:
    together = COSTS[name].round_run_s(groups, rounds).tolist()
    single: list[float] = []
    for _ in range(rounds):
        single += COSTS[name].round_run_s(groups, 1).tolist()
        groups = [
            one._replace(tokens=tuple(map(sum, zip(one.tokens, one.growth, strict=True))))
            for one in groups
        ]
    assert together == single


def test_a_scaled_round_is_that_of_its_slowest_group() -> None:
    one = DecodeWork((100, 50), (1000, 500, 7), (100, 50, 0))
    other = DecodeWork((1,), (90_000,), (1,))
    fixed = TP2.decode_s(150, (100, 50), 1100)
    assert Scaled(TP2).round_run_s([one], 1)[0] == fixed
    alone = TP2.decode_s(1, (1,), 90_001)
    assert Scaled(TP2).round_run_s([one, other], 1)[0] == max(fixed, alone)


@given(lengths=st.lists(st.integers(1, 100_000), min_size=1, max_size=5))
def test_whole_prompts_of_a_replica_cost_what_the_base_says(lengths: list[int]) -> None:
    shape = IterationShape.of([(one, 0) for one in lengths], (), len(lengths))
    squares = sum(one**2 for one in lengths)
    expected = TP2.prefill_s(1, sum(lengths), squares)
    assert ScaledIteration(TP2).iteration_s(shape) == pytest.approx(expected, rel=1e-12)


@given(chunks=st.lists(st.integers(1, 5000), min_size=1, max_size=6))
def test_chunks_of_a_prompt_add_up_to_it_but_for_the_base(chunks: list[int]) -> None:
    cost, before, total = ScaledIteration(TP2), 0, 0.0
    for tokens in chunks:
        total += cost.iteration_s(IterationShape.of([(tokens, before)], (), 1))
        before += tokens
    whole = TP2.prefill_s(1, before, before**2) + (len(chunks) - 1) * TP2.prefill[0].base_s
    assert total == pytest.approx(whole, rel=1e-9)


@given(st.integers(1, 300), st.integers(1, 10_000), st.integers(1, 40))
def test_a_decode_stretch_of_a_replica_is_its_iterations(
    decodes: int, context: int, iterations: int
) -> None:
    cost = ScaledIteration(TP2, overhead_s=1e-3)
    shapes = [
        IterationShape(0, 0, 0, 0, decodes, context + step * decodes, decodes)
        for step in range(iterations)
    ]
    expected = [cost.iteration_s(shape) for shape in shapes]
    assert cost.decode_run_s(decodes, context, iterations) == expected


def test_one_instance_prefills_as_a_replica_does() -> None:
    cost = kernels()
    shape = IterationShape.of([(700, 0), (3000, 0)], (), 2)
    assert KernelGroups(cost, FREE).prefill_s(1, [700, 3000]) == cost.iteration_s(shape)


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_with_free_links_a_member_computes_its_share_and_reads_all_kv(degree: int) -> None:
    cost, tokens = kernels(), 120_000
    pairs = -(-tokens * (tokens + 1) // 2 // degree)
    share = IterationShape(tokens // degree, pairs, tokens, 1, 0, 0, 1)
    assert KernelGroups(cost, FREE).prefill_s(degree, [tokens]) == cost.iteration_s(share)


def test_a_ring_over_a_slow_link_is_waited_for() -> None:
    slow = KernelGroups(kernels(), Exchange(32, 0.0, 1e9, 8192.0, 0.0))
    free = KernelGroups(kernels(), FREE)
    ring_s = 32 * 512 * 8192 / 1e9
    extra_s = slow.prefill_s(2, [1024]) - free.prefill_s(2, [1024])
    assert 0.5 * ring_s < extra_s <= ring_s


def test_profiling_finds_the_coefficients_of_a_base() -> None:
    found = profiled_base(Scaled(TP2), 4, "lwm_7b")
    for ours, theirs in zip(found.prefill, TP2.prefill, strict=False):
        for name in ("base_s", "token_s", "square_s"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-6)


def test_profiled_coefficients_of_kernels_predict_lengths_between() -> None:
    groups = KernelGroups(kernels(), Exchange(32, 1e-5, 2e11, 8192.0, 2e4))
    base = profiled_base(groups, 4, "lwm_7b")
    for degree in (1, 2, 4):
        for length in (2000, 16_000, 60_000):
            predicted = base.prefill_s(degree, length, length**2)
            assert predicted == pytest.approx(groups.prefill_s(degree, [length]), rel=0.25)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prefill": []}, "has no degree of parallelism"),
        ({"prefill": [PrefillScaling(base_s=0.0, token_s=1.0, square_s=0.0)]}, "base_s=0.0 must"),
        (
            {"prefill": [PrefillScaling(base_s=1.0, token_s=t, square_s=0.0) for t in (1, 2)]},
            "not monotone: token_s=2 of 2 instances exceeds 1 of 1",
        ),
        (
            {"decode": DecodeScaling(base_s=-1.0, request_s=0, master_request_s=0,
                                     context_token_s=0)},
            "decode.base_s=-1.0 must not be negative",
        ),
    ],
)  # fmt: skip
def test_a_base_that_is_not_monotone_is_refused(change: dict[str, object], says: str) -> None:
    fields: dict[str, object] = {
        "name": "mine", "model": "m", "device": "d", "source": "by hand", "prefill": TP2.prefill,
        "decode": TP2.decode,
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        ScalingBase(**(fields | change))  # pyright: ignore[reportArgumentType]


def test_rounds_of_nobody_take_no_time() -> None:
    np.testing.assert_array_equal(Scaled(TP2).round_run_s([], 3), np.zeros(3))

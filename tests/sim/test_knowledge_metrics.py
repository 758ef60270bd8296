"""Figures of runs that retrieve: hand-made tables, and parts of TTFT that add up."""

import math
from dataclasses import replace

import numpy as np
import pytest

from hardware_models.parts import load_node
from sim.api import run
from sim.engine import Engine
from sim.generations import GIVEN_UP, LOST
from sim.knowledge import Knowledge
from sim.knowledge_metrics import NAMES, knowledge_figures, mean_search_s
from sim.metrics import request_times, ttft_parts
from sim.policies.cache_eviction.pgdsf import Pgdsf
from sim.policies.request_order.cache_aware import CacheAware
from sim.policies.retrieval_overlap.none import NoOverlap
from sim.policies.retrieval_overlap.speculative import Speculative
from sim.scenario import Model, Policies, Scenario
from sim.state.knowledge_tree import MoveKind
from sim.workload.poisson import Poisson
from sim.workload.retrieval import Retrieval


def small(overlap=None, rate_per_s=2.0, **knowledge):
    """Forty questions about a small corpus."""
    return Scenario(
        model=Model(name="mistral_7b"),
        node=load_node("a10g_x1"),
        engine=Engine(max_num_seqs=4, num_blocks=800, max_model_len=4096),
        workload=Retrieval(
            rate_per_s=rate_per_s, num_requests=40, num_documents=200, document_tokens=1000,
            max_document_tokens=1500,
        ),
        policy=Policies(
            cache_eviction=Pgdsf(), request_order=CacheAware(),
            retrieval_overlap=overlap or Speculative(),
        ),
        knowledge=Knowledge(**knowledge),
    )  # fmt: skip


@pytest.mark.parametrize("overlap", [Speculative(), NoOverlap()])
@pytest.mark.parametrize("rate_per_s", [0.2, 4.0])
@pytest.mark.parametrize("overhead_s", [1e-3, 0.05, 0.5])
def test_parts_of_ttft_add_up_and_none_is_negative(overlap, rate_per_s, overhead_s):
    # Searches from a few ms to 2 s: shorter than a prefill, and longer.
    trace = run(small(overlap, rate_per_s, stage_overhead_s=overhead_s)).trace
    times = request_times(trace)
    parts = ttft_parts(trace, times)
    np.testing.assert_allclose(sum(parts), times.ttft_s, rtol=1e-12, atol=1e-12)
    for part in parts:
        assert (part >= -1e-9).all()
    order = np.argsort(trace.searches["generation"])
    search_s = (trace.searches["end_s"] - trace.searches["arrival_s"])[order]
    assert (parts.search_s <= search_s + 1e-9).all()
    if isinstance(overlap, NoOverlap):
        np.testing.assert_allclose(parts.search_s, search_s, atol=1e-9)


def test_a_speculation_hides_a_part_of_the_search():
    speculated, waited = (
        run(small(rule, 0.2, stage_overhead_s=0.1)).figures[0]
        for rule in (Speculative(), NoOverlap())
    )
    assert waited["exposed_search_mean_s"] == pytest.approx(waited["search_mean_s"])
    assert speculated["exposed_search_mean_s"] < 0.8 * waited["exposed_search_mean_s"]
    assert speculated["ttft_mean_s"] < waited["ttft_mean_s"]
    assert waited["num_speculations_stopped"] == 0 < speculated["num_speculations_stopped"]


def test_parts_of_one_search_by_hand():
    # One search of 4 x 0.5 s and hardly any scan: alone, the prefill follows it.
    scenario = small(NoOverlap(), stage_overhead_s=0.5, scan_bytes_per_s=1e15)
    scenario.workload = replace(scenario.workload, num_requests=1)
    trace = run(scenario).trace
    times = request_times(trace)
    parts = ttft_parts(trace, times)
    assert parts.search_s == pytest.approx([2.0])
    assert parts.queue_s == pytest.approx([0.0])
    assert parts.prefill_s == pytest.approx(times.first_token_s - times.scheduled_s)
    assert mean_search_s(trace, times.request) == pytest.approx(2.0)


def test_hits_and_copies_are_counted_from_the_tables():
    trace = run(small()).trace
    ids = np.array([64, 128])
    searches = {name: np.zeros(2) for name in trace.searches} | {"generation": ids}
    lookups = {name: np.zeros(3, np.int64) for name in trace.lookups} | {
        "request": np.array([64, 100, 128]),  # 100 was stopped
        "gpu_documents": np.array([1, 2, 0]),
        "host_documents": np.array([0, 0, 1]),
        "missed_documents": np.array([1, 0, 1]),
    }
    kinds = [MoveKind.insert, MoveKind.swap_out, MoveKind.replicate, MoveKind.load, MoveKind.drop]
    moves = {"kind": np.array(kinds), "blocks": np.array([100, 3, 4, 5, 100])}
    stages = {
        "stage": np.array([0, 1, 1, GIVEN_UP, LOST]), "stopped": np.array([-1, 100, 0, 7, -1]),
    }  # fmt: skip
    made = replace(trace, searches=searches, lookups=lookups, moves=moves, stages=stages)
    assert knowledge_figures(made, 10) == {
        "document_hit_share": 0.5, "gpu_hit_share": 0.25, "host_hit_share": 0.25,
        "kv_bytes_swapped_out": 70, "kv_bytes_loaded": 50, "num_speculations_stopped": 2,
        "num_clients_left": 1, "num_gpu_losses": 1,
    }  # fmt: skip


def test_without_reuse_nothing_hits():
    figures = run(small(reuse=False)).figures[0]
    assert figures["document_hit_share"] == figures["kv_bytes_loaded"] == 0


def test_other_workloads_have_no_such_figures():
    scenario = replace(
        small(), workload=Poisson(rate_per_s=2.0, num_requests=10, input_tokens=40, output_tokens=4)
    )
    figures = run(scenario).figures[0]
    names = (*NAMES, "search_mean_s", "exposed_search_mean_s")
    assert all(math.isnan(figures[name]) for name in names)
    assert figures["queue_mean_s"] >= 0


def test_clients_that_left_have_not_met_the_slo():
    scenario = small()
    scenario.knowledge.timeout_s = float(np.median(request_times(run(scenario).trace).e2e_s))
    figures = run(scenario).figures[0]
    assert figures["num_clients_left"] > 0
    whole = figures["num_requests"] + figures["num_clients_left"]
    assert figures["slo_share"] == pytest.approx(figures["num_requests"] / whole)


def test_a_run_that_nobody_waits_for_is_refused():
    scenario = small()
    scenario.knowledge.timeout_s = 1e-6
    with pytest.raises(ValueError, match=r"knowledge\.timeout_s=1e-06: every client left"):
        run(scenario)

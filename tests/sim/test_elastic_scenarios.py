"""Scenarios of elastic instances: what they run to, and what is refused at the door."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hardware_models.parts import load_cluster, load_node, load_scaling
from hardware_models.schema import Node
from sim.api import check, run
from sim.engine import Engine
from sim.faults import Fault, Kind, Part
from sim.length_latency import LengthSlo, prompt_tokens_of
from sim.metrics import request_times
from sim.plot_data import counts
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.policies.elastic import ElasticPlan
from sim.policies.instance_plan.elastic_sp import ElasticSp
from sim.policies.instance_plan.prefill_decode import PrefillDecode
from sim.policies.instance_plan.static_sp import StaticSp
from sim.scenario import CostFamily, Dtype, Model, Policies, Scenario
from sim.trace import DECODE, PREFILL, State
from sim.workload.long_context import Dataset, LongContext
from sim.workload.recorded import Recorded
from sim.workload.zipf_lengths import ZipfLengths

NODE: Node = load_node("a800_80g_x8")
ENGINE = Engine(block_size=1, num_blocks=210_000, max_num_seqs=1024, max_num_batched_tokens=500_000)


def scenario(plan: ElasticPlan | None = None, **fields: Any) -> Scenario:
    given: dict[str, Any] = {
        "model": Model(name="lwm_7b", dtype=Dtype.fp16), "engine": ENGINE, "node": NODE,
        "workload": ZipfLengths(rate_per_s=0.8, num_requests=150, max_output_tokens=1024),
        "policy": Policies(instance_plan=plan or ElasticSp()),
        "num_replicas": 4, "tp_size": 2, "cost": CostFamily.scaled,
        "scaling": load_scaling("lwm_7b_a800_tp2"),
    }  # fmt: skip
    return Scenario(**{**given, **fields})


def died(instance: int, at_s: float, **fields: Any) -> Fault:
    return Fault(part=Part.node, kind=Kind.dead, replica=instance, at_s=at_s, **fields)


@pytest.mark.parametrize("plan", [ElasticSp(), StaticSp()])
def test_a_run_answers_all_and_its_groups_are_in_the_trace(plan: ElasticPlan) -> None:
    result = run(scenario(plan))
    assert result["num_requests"] == 150
    members = result.trace.members
    assert set(members["instance"].tolist()) == {0, 1, 2, 3}
    assert sum(result.cost_shares.values()) == pytest.approx(1.0)
    assert result.cost_shares["fitted to measurements"] > 0.5


def test_groups_change_with_the_prompts_where_static_ones_do_not() -> None:
    sizes = {
        type(plan): set(degrees(run(scenario(plan)).trace.members).tolist())
        for plan in (ElasticSp(), StaticSp())
    }
    assert sizes[StaticSp] == {4}
    assert {1, 4} <= sizes[ElasticSp]


def degrees(members: Any) -> Any:
    keys = np.stack([members[name] for name in ("step", "kind", "group")])
    return np.unique(keys, axis=1, return_counts=True)[1]


def test_the_same_seed_gives_the_same_trace_and_another_one_does_not() -> None:
    first, again = (run(scenario()).trace for _ in range(2))
    other = run(scenario(seeds=[1])).trace
    np.testing.assert_array_equal(first.iterations["end_s"], again.iterations["end_s"])
    assert first.iterations["end_s"][-1] != other.iterations["end_s"][-1]


def test_elastic_groups_serve_more_within_the_slo_than_a_static_one() -> None:
    slo, met = LengthSlo(scaling=load_scaling("lwm_7b_a800_tp2")), list[float]()
    for plan in (ElasticSp(max_out_of_order=64), StaticSp()):
        trace = run(scenario(plan)).trace
        times = request_times(trace)
        met.append(slo.attainment(times, prompt_tokens_of(trace, times)))
    assert met[0] > 0.9 > met[1]


def test_a_static_group_that_never_rests_is_busy_all_the_time() -> None:
    workload = LongContext(
        dataset=Dataset.sharegpt, rate_per_s=50.0, num_requests=300, max_output_tokens=1024
    )
    assert run(scenario(StaticSp(), workload=workload))["busy_share"] > 0.97


def test_pictures_never_show_more_free_slots_than_there_are() -> None:
    free = counts(run(scenario()).trace).free_blocks
    assert free.value.max() == 4 * 210_000
    assert free.value.min() >= 0


def test_figures_tell_what_migrated_and_what_was_computed_again() -> None:
    workload = LongContext(
        dataset=Dataset.sharegpt, rate_per_s=20.0, num_requests=400, max_output_tokens=1024
    )
    result = run(scenario(workload=workload, faults=[died(0, 15.0)]))
    trace = result.trace
    moved = int(trace.kv_moves["tokens"].sum())
    assert moved > 0
    assert result["kv_bytes_moved"] == moved * 524_288
    lost = int((trace.events["state"] == State.lost).sum())
    assert result["num_rerouted"] == lost > 0
    assert result["rerouted_tokens"] >= lost


def test_the_engines_overhead_is_added_to_every_round() -> None:
    plain, slow = (
        run(scenario(engine=replace(ENGINE, iteration_overhead_s=overhead_s)))["tpot_mean_s"]
        for overhead_s in (0.0, 0.02)
    )
    assert slow > plain + 0.02


@pytest.mark.parametrize("at_s", [0.5, 30.0, 77.7])
def test_an_instance_that_dies_costs_no_answer(at_s: float) -> None:
    result = run(scenario(faults=[died(1, at_s), died(3, at_s + 5)]))
    trace = result.trace
    finished = trace.events["request"][trace.events["state"] == State.finished]
    assert sorted(finished.tolist()) == list(range(150))
    members = trace.members
    for instance, gone_s in ((1, at_s), (3, at_s + 5)):
        mine = members["instance"] == instance
        assert (members["start_s"][mine] <= gone_s).all()
        assert (members["end_s"][mine] <= gone_s).all()


@pytest.mark.parametrize("kind", [PREFILL, DECODE])
def test_an_instance_that_dies_in_the_middle_has_its_requests_computed_again(kind: int) -> None:
    members = run(scenario()).trace.members
    mine = np.flatnonzero((members["kind"] == kind) & (members["instance"] == 0))
    longest = mine[np.argmax((members["end_s"] - members["start_s"])[mine])]
    middle_s = float(members["start_s"][longest] + members["end_s"][longest]) / 2
    trace = run(scenario(faults=[died(0, middle_s)])).trace
    events = trace.events
    lost = events["request"][events["state"] == State.lost].tolist()
    cut = (trace.members["instance"] == 0) & (trace.members["end_s"] == middle_s)
    assert trace.members["kind"][cut].tolist() == [kind]
    assert lost
    for request in lost:
        states = events["state"][events["request"] == request].tolist()
        assert states.count(State.finished) == 1
        assert states.count(State.admitted) == 2


def test_costs_of_kernels_and_links_serve_too() -> None:
    result = run(scenario(cost=CostFamily.roofline, scaling=None))
    assert result["num_requests"] == 150
    assert 4 in degrees(result.trace.members).tolist()


def test_a_cluster_of_two_nodes_has_room_for_eight() -> None:
    two = scenario(node=None, cluster=load_cluster("a800_80g_x8_by_2"), num_replicas=8)
    assert run(two)["num_requests"] == 150
    with pytest.raises(ValueError, match="do not fit on a800_80g_x8"):
        check(scenario(num_replicas=5, scaling=load_scaling("lwm_7b_a800_tp2")))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"engine": replace(ENGINE, block_size=16)}, "block_size=16 must be 1"),
        ({"engine": replace(ENGINE, prefix_caching=True)}, "prefix_caching=true; take"),
        ({"engine": replace(ENGINE, schedules_ahead=True)}, "schedules_ahead=true; take"),
        ({"pp_size": 2}, "pp_size=2"),
        ({"scaling": None}, "cost=scaled needs scaling=NAME"),
        ({"scaling": load_scaling("lwm_7b_a800_tp4")}, "scaling=lwm_7b_a800_tp4 is of"),
        ({"cost": CostFamily.roofline, "scaling": load_scaling("lwm_7b_a800_tp4")},
         "scaling=lwm_7b_a800_tp4 is of model=lwm_7b with tp_size=4"),
        ({"faults": [died(0, 1.0, until_s=2.0)]}, "instances do not come back"),
        ({"workload": Recorded(arrival_s=[0.0], prompt_tokens=[900_000], output_tokens=[4])},
         "at most 840000 fit"),
    ],
)  # fmt: skip
def test_what_elastic_instances_are_not_combined_with_is_refused(
    fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        check(scenario(**fields))


def test_no_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=0 must be at least 1"):
        replace(ENGINE, num_blocks=0)


def test_rules_that_elastic_instances_do_not_ask_are_warned_of() -> None:
    policy = Policies(instance_plan=ElasticSp(), batching=ChunkedPrefill())
    with pytest.warns(UserWarning, match="policy/batching ChunkedPrefill has no effect"):
        check(scenario(policy=policy))


def test_a_split_pair_has_no_room_for_the_longest_prompt_and_elastic_instances_have() -> None:
    longest = Recorded(arrival_s=[0.0], prompt_tokens=[497_300], output_tokens=[4])
    engine = Engine(memory_utilization=0.82, max_num_seqs=128, max_num_batched_tokens=550_000)
    pair = scenario(
        policy=Policies(instance_plan=PrefillDecode()), engine=engine, num_replicas=2, tp_size=4,
        scaling=load_scaling("lwm_7b_a800_tp4"), workload=longest,
    )  # fmt: skip
    with pytest.raises(ValueError, match="request 0 needs 497300 prompt"):
        check(pair)
    assert run(scenario(workload=longest))["num_requests"] == 1


def test_datasets_of_the_paper_are_served() -> None:
    mixed = LongContext(
        dataset=Dataset.mixed, rate_per_s=0.3, num_requests=60, max_output_tokens=1024
    )
    assert run(scenario(workload=mixed))["num_requests"] == 60

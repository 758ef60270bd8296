"""What a knowledge cache cannot do is refused by value and rule, with the way out."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from hardware_models.parts import load_node
from sim.api import check
from sim.engine import Engine
from sim.faults import Fault, Kind, Part
from sim.generations import MAX_STAGES
from sim.knowledge import Knowledge
from sim.scenario import Model, Scenario
from sim.workload.base import RequestColumns
from sim.workload.knowledge import Documents, KnowledgeWorkload
from sim.workload.retrieval import Retrieval


def _make_scenario(*, engine=None, knowledge=None, **other):
    """Ten questions about a small corpus on one GPU."""
    loaded = {
        "rate_per_s": 1.0, "num_requests": 10, "num_documents": 50, "document_tokens": 100,
        "max_document_tokens": 200,
    } | other.pop("workload", {})  # fmt: skip
    fields = {"max_num_seqs": 4, "num_blocks": 200, "max_model_len": 2048} | (engine or {})
    return Scenario(
        model=Model(name="mistral_7b"),
        node=other.pop("node", load_node("a10g_x1")),
        engine=Engine(**fields),
        workload=Retrieval(**loaded),
        knowledge=Knowledge(**(knowledge or {})),
        **other,
    )


def test_the_scenario_that_the_others_change_passes():
    check(_make_scenario())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_replicas": 2}, "num_replicas=2; take num_replicas=1"),
        (
            {"faults": [Fault(part=Part.gpu, kind=Kind.slow, factor=2.0, at_s=1.0)]},
            r"faults=\[.*\]; take faults=\[\]",
        ),
        ({"engine": {"schedules_ahead": True}}, "engine.schedules_ahead=true; take engine"),
        ({"engine": {"prefix_caching": True}}, "engine.prefix_caching=true; take engine"),
        (
            {"node": load_node("l20_x2"), "pp_size": 2},
            "pp_size=2 and 2 batches in flight; take engine.batches_in_flight=1",
        ),
    ],
)
def test_what_it_is_not_combined_with_is_named(changes, message):
    with pytest.raises(ValueError, match=r"workload Retrieval .* is not combined with " + message):
        check(_make_scenario(**changes))


def test_pipeline_stages_with_one_batch_in_flight_pass():
    check(_make_scenario(node=load_node("l20_x2"), pp_size=2, engine={"batches_in_flight": 1}))


@dataclass(kw_only=True)
class _One(KnowledgeWorkload):
    """One question, whose answer is a short document."""

    shown: tuple[tuple[int, ...], ...] = ()
    """Before it, by stage."""

    def documents(self, seed):
        return Documents(np.array([10, 5000]))

    def columns(self, seed, chunk_rows=1):
        ones = np.ones(1, np.int64)
        yield RequestColumns(np.zeros(1), 15 * ones, ones, retrieved=[(*self.shown, (0,))])


def test_documents_of_a_stage_that_do_not_fit_are_named():
    scenario = replace(_make_scenario(), workload=_One())
    check(scenario)
    message = r"request 0 with documents \[1\], .* needs 5006 tokens and at most 2048 fit; shorten"
    with pytest.raises(ValueError, match=message):
        check(replace(scenario, workload=_One(shown=((0,), (1,)))))


def test_a_search_of_more_stages_than_generations_are_numbered_by_is_refused():
    scenario = replace(_make_scenario(), workload=_One(shown=((0,),) * (MAX_STAGES - 1)))
    check(scenario)
    message = rf"request 0 is searched in {MAX_STAGES + 1} stages and {MAX_STAGES} are the most"
    with pytest.raises(ValueError, match=message):
        check(replace(scenario, workload=_One(shown=((0,),) * MAX_STAGES)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("search_cores", 0), ("embedding_dimension", 0), ("host_bytes", -1), ("replicate_from", 0),
        ("searched_share", 0.0), ("searched_share", 1.5), ("scan_bytes_per_s", 0.0),
        ("scan_bytes_per_s", float("inf")), ("stage_overhead_s", -1.0),
        ("stage_overhead_s", float("nan")), ("num_vectors", 0), ("gpu_restart_s", -1.0),
        ("timeout_s", 0.0), ("timeout_s", float("inf")),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=rf"knowledge\.{field}={value} must"):
        Knowledge(**{field: value})


@pytest.mark.parametrize("lost_s", [[2.0, 1.0], [-1.0], [float("nan")]])
def test_losses_are_instants_in_order(lost_s):
    with pytest.raises(ValueError, match=r"knowledge\.gpu_lost_s=\[.*\] must be instants"):
        Knowledge(gpu_lost_s=lost_s)


def test_a_scan_takes_the_bytes_of_the_vectors_compared():
    knowledge = Knowledge(searched_share=0.5, embedding_dimension=100, scan_bytes_per_s=4e3)
    assert knowledge.scan_s(20) == pytest.approx(20 * 0.5 * 100 * 4 / 4e3)
    assert replace(knowledge, num_vectors=60).scan_s(20) == 3 * knowledge.scan_s(20)


def test_an_index_with_fewer_vectors_than_documents_is_refused():
    check(_make_scenario(knowledge={"num_vectors": 50}))
    with pytest.raises(ValueError, match=r"knowledge\.num_vectors=49 must be at least the 50"):
        check(_make_scenario(knowledge={"num_vectors": 49}))

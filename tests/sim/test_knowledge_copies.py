"""Seconds of copies between the tiers: of flows over the links of the node, all ranks at once."""

import pytest

from hardware_models.parts import load_node
from sim.engine import Engine
from sim.knowledge_setup import tiers_of
from sim.scenario import Model, Scenario
from sim.setup import prepare
from sim.workload.retrieval import Retrieval


def _make_copy(node, tp_size):
    """The node's host link, the bytes of a block, and the seconds of copying so many blocks."""
    scenario = Scenario(
        model=Model(name="llama_2_7b"), node=load_node(node), tp_size=tp_size,
        engine=Engine(max_num_seqs=4, max_model_len=2048),
        workload=Retrieval(
            rate_per_s=1.0, num_requests=2, num_documents=50, document_tokens=100,
            max_document_tokens=200,
        ),
    )  # fmt: skip
    setup = prepare(scenario)
    block_bytes = setup.limits.block_size * setup.kv_bytes_per_token
    return scenario.node.host_link, block_bytes, tiers_of(scenario, setup, 0).copy_s


@pytest.mark.parametrize(
    ("node", "tp_size", "links"),
    [
        ("a10g_x1", 1, 1),
        ("h800_sxm_x2", 2, 2),  # each GPU behind a switch of its own
        ("l20_x2", 1, 1),
        ("l20_x2", 2, 1),  # both behind one
    ],
)
def test_ranks_copy_at_once_and_share_what_is_in_front_of_a_switch(node, tp_size, links):
    link, block_bytes, copy_s = _make_copy(node, tp_size)
    assert copy_s(0) >= link.latency_s
    for blocks in (1, 1000):
        seconds = copy_s(0) + blocks * block_bytes / (links * link.bandwidth_bytes_per_s)
        assert copy_s(blocks) == pytest.approx(seconds)

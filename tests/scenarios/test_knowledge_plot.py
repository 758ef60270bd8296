"""The picture of a miss, a host hit and a GPU hit on two panels."""

from dataclasses import replace

from scenarios.compose import compose_study
from scenarios.knowledge_plot import three_requests
from sim.api import run


def test_the_picture_is_the_same_again_and_left_out_where_there_is_nothing_to_show(tmp_path):
    trace = run(compose_study("ragcache", ["workload.num_requests=60"]).scenario).trace
    drawn = [three_requests(trace, trace, tmp_path / f"{at}.png") for at in range(2)]
    assert [path.read_bytes()[:4] for path in drawn] == [b"\x89PNG"] * 2
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    gone = replace(trace, lookups={name: column[:0] for name, column in trace.lookups.items()})
    assert three_requests(trace, gone, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()

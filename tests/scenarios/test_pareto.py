"""The Pareto front is what no point beats, and a report draws it."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from scenarios.pareto import Dot, front

FEW = st.integers(0, 6).map(float)
DOTS = st.lists(st.builds(Dot, FEW, FEW, st.text(max_size=2), st.just(""), st.just(False)),
                max_size=25)  # fmt: skip
NAMES = st.sampled_from(["usd_per_hour", "ttft_p99_s", "goodput_requests_per_s", "slo_share"])


@given(DOTS, NAMES, NAMES)
def test_the_front_is_what_no_point_beats(dots, x, y):
    signs = [1 if name in ("usd_per_hour", "ttft_p99_s") else -1 for name in (x, y)]
    losses = [(signs[0] * dot.x, signs[1] * dot.y) for dot in dots]
    unbeaten = {
        one
        for one in losses
        if not any(a <= one[0] and b <= one[1] and (a, b) != one for a, b in losses)
    }
    found = front(dots, x, y)
    assert [(signs[0] * dot.x, signs[1] * dot.y) for dot in found] == sorted(
        unbeaten, key=lambda one: signs[0] * one[0]
    )
    assert set(found) <= set(dots)


def test_a_report_draws_two_figures_of_choice(diptych):
    diptych("run", "-m", "-cn", "capacity", "workload.num_requests=24", "seeds=[0]", "out=o",
            "gpu=l40s,h100_sxm", "workload.rate_per_s=2,8")  # fmt: skip
    code, out, _ = diptych("report", "o")
    assert code == 0
    assert "ttft_p99_s against usd_per_hour" in out
    picture = Path("o/pareto.png").read_bytes()
    assert diptych("report", "o")[0] == 0
    assert Path("o/pareto.png").read_bytes() == picture
    code, out, _ = diptych("report", "o", "x=throughput_tokens_per_s", "y=tpot_p50_s")
    assert code == 0
    assert "tpot_p50_s against throughput_tokens_per_s" in out
    assert Path("o/pareto.png").read_bytes() != picture
    code, out, errors = diptych("report", "o", "y=ttft_p98_s")
    assert (code, out) == (2, "")
    assert "figure ttft_p98_s is not in the sweep; did you mean 'ttft_p" in errors


def test_a_sweep_of_one_price_has_no_picture_unless_figures_are_named(diptych):
    diptych("run", "-m", "-cn", "replica", "workload.num_requests=24", "seeds=[0]", "out=o",
            "policy/batching=continuous", "workload.rate_per_s=4")  # fmt: skip
    code, out, _ = diptych("report", "o")
    assert code == 0
    assert "choose figures by x=, y=" in out
    assert not Path("o/pareto.png").exists()
    assert diptych("report", "o", "x=usd_per_hour")[0] == 0
    assert Path("o/pareto.png").exists()

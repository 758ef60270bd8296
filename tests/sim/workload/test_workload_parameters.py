"""Parameters of generated workloads that are refused, and those that warn."""

import math

import pytest

from sim.workload.arrivals import Stage
from sim.workload.closed_loop import ClosedLoop, ThinkTimes
from sim.workload.gamma import Gamma
from sim.workload.lengths import LengthDistribution
from sim.workload.poisson import Poisson

TOKENS = {"input_tokens": 566, "output_tokens": 247}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rate_per_s": -1.0}, r"rate_per_s=-1.0 must be positive.*try"),
        ({"rate_per_s": math.nan}, r"rate_per_s=nan must be positive"),
        ({"rate_per_s": None}, r"rate_per_s=None must be given"),
        ({"num_requests": 0}, r"num_requests=0 must be at least 1; try"),
        ({"num_requests": 10**12}, r"num_requests=1000000000000 must be at most 100,000,000"),
        ({"num_requests": None}, r"exactly one must be given"),
        ({"duration_s": 5.0}, r"exactly one must be given"),
        ({"stages": [Stage(rate_per_s=1, duration_s=1)]}, r"set rate_per_s, .* to null"),
        ({"input_tokens": 0}, r"input_tokens=0 is a mean"),
        ({"max_tokens": 300}, r"input_tokens=566 is a mean.*max_tokens=300; try input_tokens=300"),
        ({"min_tokens": 0}, r"min_tokens=0 must be at least 1"),
        ({"min_tokens": 9, "max_tokens": 8}, r"max_tokens=8 must lie between min_tokens=9"),
        ({"max_output_tokens": 0}, r"max_output_tokens=0"),
        ({"lengths": LengthDistribution.lognormal}, r"needs length_cv"),
        ({"lengths": LengthDistribution.uniform, "length_cv": 0.9}, r"must be at most 0.577"),
    ],
)
def test_parameters_out_of_range_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Poisson(**{"rate_per_s": 1.0, "num_requests": 10, **TOKENS, **changed})


def test_other_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"burstiness_cv=0 must be positive"):
        Gamma(rate_per_s=1.0, num_requests=1, burstiness_cv=0, **TOKENS)
    with pytest.raises(ValueError, match=r"stages.rate_per_s=-1"):
        Stage(rate_per_s=-1, duration_s=1)
    with pytest.raises(ValueError, match=r"must bring requests"):
        Poisson(stages=[Stage(rate_per_s=0, duration_s=1)], **TOKENS)
    with pytest.raises(ValueError, match=r"num_clients=3 must not exceed num_requests=2"):
        ClosedLoop(num_clients=3, num_requests=2, **TOKENS)
    with pytest.raises(ValueError, match=r"think_time_s=-1"):
        ClosedLoop(num_clients=1, num_requests=2, think_time_s=-1, **TOKENS)


def test_a_setting_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match="length_cv=0.5 has no effect"):
        Poisson(rate_per_s=1.0, num_requests=1, length_cv=0.5, **TOKENS)
    with pytest.warns(UserWarning, match="think_times=exponential has no effect"):
        ClosedLoop(num_clients=1, num_requests=1, think_times=ThinkTimes.exponential, **TOKENS)

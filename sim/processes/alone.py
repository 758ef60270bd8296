"""One replica that serves a source by itself."""

from sim.engine import ReplicaLimits
from sim.policies.batching.base import Batching
from sim.processes.exact_time import ExactEnvironment
from sim.processes.feed import Feed
from sim.processes.pace import Pace
from sim.processes.replica import Replica
from sim.trace import Trace
from sim.workload.source import Source


def simulate(
    source: Source,
    batching: Batching,
    limits: ReplicaLimits,
    pace: Pace,
    *,
    one_by_one: bool = False,
    schedules_ahead: bool = False,
) -> Trace:
    """Serve all requests of a source on one replica; the requests that arrive decide the end.

    Args:
        source: requests in order of arrival; a closed loop issues the next one at an answer.
        batching: decides every iteration.
        limits: of the engine.
        pace: how long iterations last.
        one_by_one: ask the policy at every iteration, also where its decision stands.
        schedules_ahead: each iteration is decided when the one before it begins, so a request that
            arrives meanwhile is seen one decision later; an idle replica decides at once.

    Raises:
        ValueError: the policy overbooks blocks or seats, or leaves requests unserved.
    """
    environment = ExactEnvironment()
    feed = Feed(environment, source)
    replica = Replica(
        environment, batching, limits, pace,
        one_by_one=one_by_one, schedules_ahead=schedules_ahead, finished=feed.answered,
    )  # fmt: skip
    feed.start(replica.submit)
    environment.run()
    unserved = replica.state.num_unfinished
    if unserved:
        raise ValueError(
            f"policy {type(batching).__name__} left {unserved} requests unserved and waits for "
            "arrivals that never come; mend the policy"
        )
    return replica.recorder.trace()

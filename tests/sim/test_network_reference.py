"""The network against a plain simulation of every flow by itself, whatever changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network_cases import network, rows


def rates(active, capacity):
    """Progressive filling in plain Python. `active`: {flow: links}."""
    left, growing, found = dict(enumerate(capacity)), dict(active), {}
    while growing:
        crossed = {link: [f for f, p in growing.items() if link in p] for link in left}
        shares = {link: left[link] / len(flows) for link, flows in crossed.items() if flows}
        tightest = min(shares, key=shares.get)
        level = max(shares[tightest], 0.0)
        for flow in crossed[tightest]:
            found[flow] = level
            for link in growing.pop(flow):
                left[link] -= level
    return found


def reference(sends, changes, drops, capacity):
    """When each flow is done; None for one that was dropped."""
    capacity, ends = list(capacity), {}
    left = {flow: size for flow, (_, _, size) in enumerate(sends)}
    agenda = sorted(
        [(start, 0, flow) for flow, (start, _, _) in enumerate(sends)]
        + [(instant, 1, change) for change, (instant, _, _) in enumerate(changes)]
        + [(instant, 2, flow) for instant, flow in drops]
    )
    now, active = 0.0, {}
    while agenda or active:
        speed = rates(active, capacity)
        finish = {f: now + left[f] / r if r > 0 else np.inf for f, r in speed.items()}
        soonest = min(finish.values(), default=np.inf)
        instant = min(soonest, agenda[0][0] if agenda else np.inf)
        for flow in active:
            left[flow] -= speed[flow] * (instant - now)
        now = instant
        for flow, end in finish.items():
            if end <= now * (1 + 1e-12):
                ends[flow] = now
                del active[flow]
        while agenda and agenda[0][0] <= now:
            _, what, number = agenda.pop(0)
            if what == 0:
                active[number] = sends[number][1]
            elif what == 1:
                capacity[changes[number][1]] = changes[number][2]
            elif number in active:
                del active[number]
                ends[number] = None
    return [ends[flow] for flow in range(len(sends))]


def simulated(sends, changes, drops, capacity):
    net = network(capacity)
    transfers = [None] * len(sends)

    def at(instant, action):
        def process():
            yield net.environment.timeout(instant)
            action()

        net.environment.process(process())

    def begin(flow):
        transfers[flow] = net.send(rows(sends[flow][1]), sends[flow][2])

    def abort(flow):
        if transfers[flow].flows_left:
            net.abort(transfers[flow])

    for flow, (start, _, _) in enumerate(sends):
        at(start, lambda flow=flow: begin(flow))
    for instant, link, value in changes:
        at(instant, lambda link=link, value=value: net.set_link_capacity(2 * link, value))
    for instant, flow in drops:
        at(instant, lambda flow=flow: abort(flow))
    net.environment.run()
    return [one.arrives_s if one.triggered else None for one in transfers]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_all_flows_arrive_as_in_a_simulation_of_each_by_itself(seed):
    """Many begin at once, on links that look alike, so that classes form and are parted again."""
    rng = np.random.default_rng(seed)
    num_links = int(rng.integers(1, 8))
    capacity = rng.choice([1.0, 2.0], num_links)
    sends = [
        (
            float(rng.choice([0.0, 3.0, rng.uniform(0, 20)])),
            rng.permutation(num_links)[: rng.integers(1, 4)].tolist(),
            float(rng.choice([4.0, 8.0])),
        )
        for _ in range(int(rng.integers(1, 40)))
    ]  # fmt: skip
    changes = [
        (float(rng.uniform(0, 30)), int(rng.integers(num_links)), float(rng.choice([0.5, 1, 2])))
        for _ in range(int(rng.integers(0, 4)))
    ]  # fmt: skip
    drops = [
        (sends[flow][0] + float(rng.uniform(0.1, 5)), flow)
        for flow in rng.choice(len(sends), min(len(sends), int(rng.integers(0, 4))), replace=False)
    ]
    want = reference(sends, changes, drops, capacity)
    got = simulated(sends, changes, drops, capacity)
    assert [end is None for end in got] == [end is None for end in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours is None or ours == pytest.approx(theirs, rel=1e-9)

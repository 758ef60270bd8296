"""Where experts lie: EPLB's published example and rules, and laws that every placement keeps."""

from copy import deepcopy
from dataclasses import dataclass, field
from itertools import combinations, combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.policies.expert_balance.base import (
    BalanceView,
    ExpertBalance,
    Placement,
    checked_placement,
)
from sim.policies.expert_balance.replicate_hot import ReplicateHot, pack, replicate
from sim.policies.expert_balance.static import Static
from sim.policies.registry import policies
from sim.scenario import Policies

RULES = policies("expert_balance")
README = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
"""The example of EPLB's README: two layers of 12 experts in 4 groups."""


@st.composite
def views(draw):
    """Whole loads, so that sums do not depend on their order."""
    hosts, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups, size = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    num_nodes, num_experts = hosts * nodes, groups * size
    least = -(-num_experts // num_nodes)
    row = st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts)
    loads = draw(st.lists(row, min_size=1, max_size=3))
    slots = draw(st.integers(least, least + 3))
    return BalanceView(np.array(loads, np.float64), num_nodes, slots, groups, hosts)


def fitting(rule, view):
    """A view that the rule can fill: static needs each expert equally often."""
    if rule is not Static:
        return view
    return view._replace(slots_per_node=view.loads.shape[1])


def plain_packing(loads, packs):
    """Items of each pack, by EPLB's rule, one item at a time."""
    room = len(loads) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    found, weights = [[] for _ in range(packs)], [0.0] * packs
    for item in sorted(range(len(loads)), key=lambda one: -loads[one]):
        open_packs = [at for at in range(packs) if len(found[at]) < room]
        at = min(open_packs, key=lambda one: weights[one])
        found[at].append(item)
        weights[at] += loads[item]
    return found


def plain_layer(loads, view):
    """One layer by EPLB's two policies, in plain Python."""
    groups, hosts = view.num_groups, view.num_hosts
    if groups % hosts:
        groups, hosts = 1, 1
    size = len(loads) // groups
    sums = [sum(loads[group * size : (group + 1) * size]) for group in range(groups)]
    nodes, row = view.num_nodes // hosts, []
    for mine in plain_packing(sums, hosts):
        experts = [group * size + at for group in mine for at in range(size)]
        copies, counts = list(experts), dict.fromkeys(experts, 1)
        while len(copies) < nodes * view.slots_per_node:
            hottest = max(experts, key=lambda expert: loads[expert] / counts[expert])
            counts[hottest] += 1
            copies.append(hottest)
        shares = [loads[expert] / counts[expert] for expert in copies]
        row += [copies[slot] for one in plain_packing(shares, nodes) for slot in one]
    return row


def best_maximum(loads, packs):
    """The least possible heaviest pack with equally many items in each, by trying all."""
    if not loads:
        return 0.0
    room, first, others = len(loads) // packs, loads[0], range(1, len(loads))
    best = np.inf
    for chosen in combinations(others, room - 1):
        weight = first + sum(loads[at] for at in chosen)
        if weight < best:
            rest = [loads[at] for at in others if at not in chosen]
            best = min(best, max(weight, best_maximum(rest, packs - 1)))
    return best


def test_the_example_of_the_published_readme_comes_out_slot_by_slot():
    view = BalanceView(README, num_nodes=8, slots_per_node=2, num_groups=4, num_hosts=2)
    assert checked_placement(ReplicateHot(), view).physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


@given(view=views())
def test_replicate_hot_is_the_published_rule_done_one_expert_at_a_time(view):
    placed = checked_placement(ReplicateHot(), view)
    plain = [plain_layer(row, view) for row in view.loads.tolist()]
    assert placed.physical_to_logical.tolist() == plain


@pytest.mark.parametrize(
    ("packs", "room", "most", "factor"),
    [
        (2, 2, 9, 1),
        (3, 2, 6, 1),
        (4, 2, 3, 1),
        (2, 3, 6, 7 / 6),
        (2, 4, 4, 7 / 6),
        (3, 3, 3, 7 / 6),
    ],
)
def test_packing_pairs_is_optimal_and_larger_packs_lose_a_sixth_at_most(packs, room, most, factor):
    """Every choice of loads from 0 to `most`, against the best of all packings."""
    loads = list(combinations_with_replacement(range(most + 1), packs * room))
    items = pack(np.array(loads, np.float64), packs).reshape(len(loads), -1)
    sums = np.take_along_axis(np.array(loads), items, 1).reshape(-1, packs, room).sum(axis=2)
    best = [best_maximum(one, packs) for one in loads]
    assert (sums.max(axis=1) <= np.array(best) * factor + 1e-9).all()
    if factor > 1:
        assert (sums.max(axis=1) > best).any()


@given(loads=st.lists(st.integers(0, 30), min_size=1, max_size=4), further=st.integers(0, 5))
def test_no_other_choice_of_copies_has_a_smaller_largest_share(loads, further):
    _, shares = replicate(np.array([loads], np.float64), len(loads) + further)
    others = combinations_with_replacement(range(len(loads)), further)
    best = min(
        max(load / (1 + copies.count(expert)) for expert, load in enumerate(loads))
        for copies in others
    )
    assert shares.max() == pytest.approx(best)


@given(view=views())
def test_nodes_of_a_host_differ_by_its_largest_physical_expert_at_most(view):
    """Proof for two packs (others never decide between these): let D_j be the lead of the first
    over the second in their first j items. If the first got its item j while the second had no
    more than j items, it was not ahead before, so D_j is that item at most. Else the second's item
    j came earlier and is no smaller, so D_j <= D_(j-1). Hence D_j <= the largest item, to the end.
    """
    even = view.num_groups % view.num_hosts == 0
    hosts = view.num_hosts if even else 1
    placed = checked_placement(ReplicateHot(), view)
    nodes = placed.node_loads(view.loads).reshape(len(view.loads), hosts, -1)
    counts = np.stack([np.bincount(row) for row in placed.physical_to_logical])
    shares = np.take_along_axis(view.loads / counts, placed.physical_to_logical, axis=1)
    largest = shares.reshape(len(view.loads), hosts, -1).max(axis=2)
    assert (np.ptp(nodes, axis=2) <= largest + 1e-9).all()


@given(
    loads=st.lists(st.integers(0, 99), min_size=12, max_size=12), nodes=st.sampled_from([2, 3, 4])
)
def test_with_a_slot_each_and_the_hottest_first_static_is_never_better(loads, nodes):
    view = BalanceView(np.array([sorted(loads, reverse=True)], np.float64), nodes, 12 // nodes)
    hot, static = (
        checked_placement(rule, view).node_loads(view.loads).max()
        for rule in (ReplicateHot(), Static())
    )
    assert hot <= static


@given(view=views())
def test_groups_stay_whole_on_a_host_where_hosts_share_them_out(view):
    placed = checked_placement(ReplicateHot(), view).physical_to_logical
    if view.num_groups % view.num_hosts:
        return
    group = placed // (view.loads.shape[1] // view.num_groups)
    for row in group.reshape(len(placed), view.num_hosts, -1):
        held = [set(host.tolist()) for host in row]
        assert sum(map(len, held)) == len(set().union(*held)) == view.num_groups
        assert {len(one) for one in held} == {view.num_groups // view.num_hosts}


@pytest.mark.parametrize("name", RULES)
@given(view=views())
def test_every_rule_places_every_expert_and_changes_nothing_that_it_sees(name, view):
    view, rule = fitting(RULES[name], view), RULES[name]()
    before, fields = view.loads.copy(), deepcopy(rule)
    placed = rule.place(view)
    num_layers, num_experts = view.loads.shape
    assert placed.physical_to_logical.dtype == np.int64
    assert placed.physical_to_logical.shape == (num_layers, view.num_nodes * view.slots_per_node)
    assert all(set(row) == set(range(num_experts)) for row in placed.physical_to_logical.tolist())
    again = rule.place(view)
    np.testing.assert_array_equal(again.physical_to_logical, placed.physical_to_logical)
    np.testing.assert_array_equal(view.loads, before)
    assert rule == fields
    checked_placement(rule, view)


@pytest.mark.parametrize("name", RULES)
@given(view=views())
def test_layers_are_placed_apart_and_only_relations_of_loads_count(name, view):
    rule = RULES[name]()
    view = fitting(RULES[name], view)
    together = rule.place(view).physical_to_logical
    for layer, row in enumerate(together):
        alone = rule.place(view._replace(loads=view.loads[[layer]] * 4.0))
        np.testing.assert_array_equal(alone.physical_to_logical, row[None])


@given(view=views())
def test_helpers_say_what_the_map_says(view):
    placed = checked_placement(ReplicateHot(), view)
    row = placed.physical_to_logical[0].tolist()
    experts = range(view.loads.shape[1])
    assert placed.num_experts == len(experts)
    slots = [[slot for slot, one in enumerate(row) if one == expert] for expert in experts]
    assert [one.tolist() for one in placed.replicas(0)] == slots
    assert placed.node_of(np.arange(len(row))).tolist() == [
        node for node in range(view.num_nodes) for _ in range(view.slots_per_node)
    ]
    carried = [0.0] * view.num_nodes
    for expert in experts:
        for slot in slots[expert]:
            carried[slot // view.slots_per_node] += view.loads[0, expert] / len(slots[expert])
    assert placed.node_loads(view.loads)[0] == pytest.approx(carried)


def test_static_repeats_the_experts_in_order():
    placed = checked_placement(
        Static(), BalanceView(np.ones((2, 4)), num_nodes=4, slots_per_node=2)
    )
    assert placed.physical_to_logical.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2


def test_static_is_what_a_scenario_begins_with():
    assert Policies().expert_balance == Static()
    assert set(RULES) >= {"static", "replicate_hot"}


GOOD = BalanceView(README, num_nodes=6, slots_per_node=2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_nodes": 5}, r"hold 10 physical experts .* num_experts=12; try slots_per_node=3"),
        ({"num_nodes": 0}, r"num_nodes=0 must be at least 1"),
        ({"num_hosts": 4}, r"num_hosts=4 must divide num_nodes=6; try num_hosts=3"),
        ({"num_groups": 5}, r"num_groups=5 must divide num_experts=12; try num_groups=4"),
        ({"loads": README * -1}, r"loads\[0, 0\]=-90.0 must be finite and not negative"),
        ({"loads": README + np.inf}, r"loads\[0, 0\]=inf must be finite"),
        ({"slots_per_node": 3}, r"policy Static: .* 18 physical .* multiple of 12, or .*hot"),
    ],
)
def test_what_cannot_be_placed_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        checked_placement(Static(), GOOD._replace(**changed))


@dataclass(kw_only=True)
class Rogue(ExpertBalance):
    """Answers with whatever it was given."""

    answer: Placement = field(default_factory=lambda: Static().place(GOOD))

    def place(self, view):
        return self.answer


def changed_slot(value):
    placed = Static().place(GOOD)
    placed.physical_to_logical[1, 7] = value
    return placed


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (changed_slot(3), r"expert 7 of layer 1 has 0 slots"),
        (changed_slot(12), r"slot 7 of layer 1 holds expert 12 and there are experts 0 to 11"),
        (changed_slot(-1), r"holds expert -1"),
        (Placement(Static().place(GOOD).physical_to_logical[:1], 2), r"\(1, 12\).*= \(2, 12\)"),
        (Placement(Static().place(GOOD).physical_to_logical, 3), r"slots_per_node=3; they must"),
        (Placement(np.zeros((2, 12)), 2), r"float64 and must place int64"),
    ],
)
def test_a_rule_that_breaks_the_contract_is_named(answer, message):
    with pytest.raises(ValueError, match=rf"policy Rogue.*{message}.*; mend the policy"):
        checked_placement(Rogue(answer=answer), GOOD)
    checked_placement(Rogue(), GOOD)

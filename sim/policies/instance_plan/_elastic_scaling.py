"""Step 4 of LoongServe: down to the fewest instances after a prefill, up as batches need it.

Down: the fullest members of a group are filled first, the others are free when the prefill ends.
Up: a batch that is short of slots joins the batch that has most to spare, or gets empty instances;
and one whose mini-batches would be so large that the matrix products bind gets another master. New
KV goes to the fullest members that have room, so that the others stay as empty as they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sim.policies.instance_plan._elastic_cluster import Cluster, Gang, joined
from sim.steps import FOREVER, DecodeGroup


class ScaleRules(NamedTuple):
    """Settings of the plan that matter here."""

    compute_bound_requests: int
    """A mini-batch up to this size costs about as much as one request."""
    scale_up: bool


class DecodePlan(NamedTuple):
    """A round."""

    groups: list[DecodeGroup]
    short: list[Gang]
    """Who lacks slots and is in no group."""
    rounds: int
    """For so many rounds the same plan follows: until a master has no room for another."""


def fill_in_order(tokens: int, members: Sequence[int], now: Cluster) -> tuple[tuple[int, int], ...]:
    """Where a prefill's KV goes: to the fullest member, then to the next.

    Args:
        tokens: that fit the members' free slots.
        members: of the group.
        now: for their free slots.
    """
    found: list[tuple[int, int]] = []
    for at in sorted(members, key=lambda at: (now.free[at], at)):
        taken = min(tokens, now.free[at])
        if taken:
            found.append((at, taken))
            tokens -= taken
    return tuple(found)


def plan_decode(
    gangs: Sequence[Gang], now: Cluster, empty: Sequence[int], rules: ScaleRules
) -> DecodePlan:
    """Groups of a round, one slot for every request of theirs.

    Args:
        gangs: what may decode, on disjoint instances.
        now: for free slots.
        empty: instances that nobody uses.
        rules: settings.
    """
    spare, groups, rounds = list(empty), list[DecodeGroup](), FOREVER
    fine, added, short = _with_slots(gangs, now, spare, rules)
    for gang in fine:
        members = sorted(gang.instances, key=lambda at: (now.free[at], at))
        members += added.get(gang.batches[0], [])
        masters = _masters(gang.num_requests, members, now, spare, rules)
        held = gang.instances.union(at for at, _ in masters)
        groups.append(DecodeGroup(gang.batches, tuple(sorted(held)), masters))
        rounds = min(rounds, *[now.free[at] // size for at, size in masters])
    return DecodePlan(groups, short, rounds)


def _with_slots(
    gangs: Sequence[Gang], now: Cluster, spare: list[int], rules: ScaleRules
) -> tuple[list[Gang], dict[int, list[int]], list[Gang]]:
    """Gangs that can decode, by first batch; instances added to them; and gangs that cannot.

    Instances that are added are taken from `spare`.
    """
    slack = {gang: now.room(gang.instances) - gang.num_requests for gang in gangs}
    added: dict[int, list[int]] = {}
    short: list[Gang] = []
    fine = [gang for gang in gangs if slack[gang] >= 0]
    for gang in [gang for gang in gangs if slack[gang] < 0]:
        # A request that fills its instances by itself could never go on without another.
        scales = rules.scale_up or gang.num_requests == 1
        helpers = sorted([one for one in fine if slack[one] > 0], key=lambda one: -slack[one])
        more = len(spare) * now.slots if scales else 0
        count = _fewest(slack[gang] + more, [slack[one] for one in helpers])
        if count is None:
            short.append(gang)
            continue
        used = helpers[:count]
        together = joined([gang, *used]) if used else gang
        slack[together] = slack[gang] + sum([slack[one] for one in used])
        taken = [at for one in used for at in added.pop(one.batches[0], [])]
        needed = -(min(0, slack[together]) // now.slots)
        taken += spare[:needed]
        del spare[:needed]
        slack[together] += needed * now.slots
        added[together.batches[0]] = taken
        fine = [one for one in fine if one not in used] + [together]
    return sorted(fine, key=lambda one: one.batches[0]), added, short


def _fewest(slack: int, helpers: Sequence[int]) -> int | None:
    """How many helpers make it suffice, one at least if there is any; None: all do not."""
    for count, more in enumerate(helpers, 1):
        slack += more
        if slack >= 0:
            return count
    return 0 if not helpers and slack >= 0 else None


def _masters(
    need: int, members: Sequence[int], now: Cluster, spare: list[int], rules: ScaleRules
) -> tuple[tuple[int, int], ...]:
    """Mini-batches, on the fullest members that have room.

    An earlier one is never smaller unless its room binds: as masters fill, their order stays.
    """
    bound = rules.compute_bound_requests
    roomy = [at for at in members if now.free[at]]
    sizes: list[int] = []
    for place, at in enumerate(roomy):  # which grows
        while rules.scale_up and spare and need // (len(roomy) - place) > bound:
            roomy.append(spare.pop(0))
        share = -(-need // (len(roomy) - place))
        sizes.append(min(need, now.free[at], max(share, bound)))
        need -= sizes[-1]
        if not need:
            break
    for place, at in enumerate(roomy[: len(sizes)]):
        more = min(need, now.free[at] - sizes[place])
        sizes[place] += more
        need -= more
    return tuple(zip(roomy[: len(sizes)], sizes, strict=True))

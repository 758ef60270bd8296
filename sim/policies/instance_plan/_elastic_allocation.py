"""Step 2 of LoongServe: which instances prefill what was chosen (section 5.2).

Idle ones first. The KV of batches is packed onto the fewest instances, the emptiest giving its own
away, while another idle instance saves the prefill more than the move takes (equations 3 and 4;
both divide by the same lengths, which cancel). When slots are short, batches with most free slots
are stopped. Of the others, a batch is stopped when the prefill gains more from its instances than
its requests lose.
"""

from typing import NamedTuple

from hardware_models.scaling import ScalingBase
from sim.policies.instance_plan._elastic_cluster import Cluster, Gang, Load, prefill_s
from sim.steps import Migration


class Allocation(NamedTuple):
    """Instances for a prefill; packing has changed the cluster that it was made of."""

    pool: list[int]
    migrations: list[Migration]


def allocate(
    now: Cluster, load: Load, scaling: ScalingBase, generated: dict[int, int],
    migration_s_per_token: float | None,
) -> Allocation:  # fmt: skip
    """Instances of `now.open` for prompts that fit their free slots.

    Args:
        now: packing changes it.
        load: of the prompts.
        scaling: seconds of a prefill.
        generated: tokens of all answers of each batch so far.
        migration_s_per_token: what moving KV takes; None: it never moves.
    """
    pool = [at for at in now.open if now.is_empty(at)]
    migrations: list[Migration] = []
    if migration_s_per_token is not None and len(pool) < len(now.open):
        migrations = _pack(now, pool, load, scaling, migration_s_per_token)
    opened = set(now.open)
    gangs = [gang for gang in now.gangs() if gang.instances <= opened]
    if load.tokens > now.room(pool):
        for gang in sorted(gangs, key=lambda gang: -now.room(gang.instances)):
            pool += sorted(gang.instances)
            gangs.remove(gang)
            if load.tokens <= now.room(pool):
                break
    for gang in gangs:
        if _stops(gang, len(pool), load, scaling, generated):
            pool += sorted(gang.instances)
    return Allocation(pool, migrations)


def _stops(
    gang: Gang, have: int, load: Load, scaling: ScalingBase, generated: dict[int, int]
) -> bool:
    """Whether the prefill gains more from a gang's instances than the gang loses by stopping."""
    if not have:
        return True
    together_s = prefill_s(scaling, have + len(gang.instances), load)
    speedup = (prefill_s(scaling, have, load) - together_s) * load.inverse
    answered = sum(generated[number] for number in gang.batches)
    return speedup >= together_s * gang.num_requests * gang.num_requests / answered


def _pack(
    now: Cluster, pool: list[int], load: Load, scaling: ScalingBase, seconds_per_token: float
) -> list[Migration]:
    """Empty the emptiest busy instances while it pays; they join `pool`."""
    opened = set(now.open)
    movable = {one: now.held[one] for one in now.held if opened.issuperset(now.held[one])}
    busy = sorted(
        [at for at in now.open if not now.is_empty(at)], key=lambda at: (now.free[at], at)
    )
    used = sum([now.slots - now.free[at] for at in busy])
    used += sum([now.counts[one] for one in movable])  # a slot each for their next round
    least = -(-used // now.slots)
    if least >= len(busy) or load.tokens > (len(now.open) - least) * now.slots:
        return []
    kept, found = busy[:least], list[Migration]()
    for source in reversed(busy[least:]):
        moved = now.slots - now.free[source]
        if pool and len(pool) * now.slots >= load.tokens:
            gain_s = prefill_s(scaling, len(pool), load)
            gain_s -= prefill_s(scaling, len(pool) + 1, load)
            if gain_s < moved * seconds_per_token:
                break
        for target in sorted(kept, key=lambda at: (-now.free[at], at)):
            found += _moved(now, source, target)
        pool.append(source)
    pool.sort()
    return found


def _moved(now: Cluster, source: int, target: int) -> list[Migration]:
    """As much from one instance to another as there is and as fits, batch by batch."""
    found: list[Migration] = []
    for number in sorted(now.held):
        held = now.held[number]
        tokens = min(held.get(source, 0), now.free[target])
        if tokens:
            held[source] -= tokens
            held[target] = held.get(target, 0) + tokens
            if not held[source]:
                del held[source]
            now.free[source] += tokens
            now.free[target] -= tokens
            found.append(Migration(number, source, target, tokens))
    return found

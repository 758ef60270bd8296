"""When nothing can go on for want of slots: the latest request loses its KV, then the next."""

from collections.abc import Callable

from sim.policies.elastic import ElasticView
from sim.policies.instance_plan._elastic_cluster import Cluster
from sim.policies.instance_plan._elastic_scaling import DecodePlan


def without_latest(
    view: ElasticView, now: Cluster, plan: Callable[[Cluster], DecodePlan]
) -> tuple[tuple[int, ...], DecodePlan]:
    """Who is pre-empted so that all others can decode, the earliest first, and how they do.

    Args:
        view: for what requests hold.
        now: the deployment, in which everything may decode.
        plan: a round of a deployment that holds less.
    """
    fewer = now.copy()
    owners: dict[int, int] = {}
    for batch in view.batches:
        if batch.number in now.counts:
            owners |= dict.fromkeys(batch.request_ids.tolist(), batch.number)
    gone: list[int] = []
    for request in sorted(owners, reverse=True):
        _drop(fewer, owners[request], view.given_up(request).tolist())
        gone.append(request)
        decode = plan(fewer)
        if not decode.short:
            return tuple(sorted(gone)), decode
    return tuple(sorted(gone)), plan(fewer)


def _drop(now: Cluster, number: int, freed: list[int]) -> None:
    """Take one request's KV out of the picture."""
    held = now.held[number]
    for at, tokens in enumerate(freed):
        if tokens:
            now.free[at] += tokens
            held[at] -= tokens
            if not held[at]:
                del held[at]
    now.counts[number] -= 1
    if not now.counts[number]:
        del now.counts[number], now.held[number]

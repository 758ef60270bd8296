"""The largest batch that a deployment decodes within its memory and its SLO, or what it lacks."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, NoReturn

from sim.policies.parallel_plan.base import Deployment, GpuType, Part, Plan, PlanView
from sim.state.ping_pong import total_s

MOST_NODE_TOKENS = 1 << 16
"""Requests of one micro-batch on one node at most; beyond it nothing is learnt."""


class Shortfall(NamedTuple):
    """Why a deployment serves not even one request a micro-batch on every node."""

    deployment: Deployment
    bound: str
    """`attention memory`, `expert memory` or `slo`."""
    needed: float
    allowed: float

    @property
    def times(self) -> float:
        """How often what is allowed is needed."""
        return self.needed / self.allowed if self.allowed > 0 else float("inf")

    def __str__(self) -> str:
        attention, experts, count = self.deployment
        where = f"{attention.num_nodes} x {attention.tp_size} {attention.gpu} for attention"
        if experts is not None:
            where += f", {experts.num_nodes} x {experts.tp_size} {experts.gpu} for experts"
        unit, scale = ("ms a token", 1e3) if self.bound == "slo" else ("GiB", 2.0**-30)
        return (
            f"{where}, {count} micro-batches: {self.bound} binds first, {self.needed * scale:.4g} "
            f"{unit} are needed and {self.allowed * scale:.4g} allowed ({self.times:.2f} times)"
        )


def largest_batch(view: PlanView, deployment: Deployment) -> Plan | Shortfall:
    """By binary search (Algorithm 1): an iteration never gets shorter with more requests."""
    _, experts, count = deployment
    if experts is not None and (lack := _expert_shortfall(view, deployment, experts)) is not None:
        return lack
    fitting = fitting_tokens(view, deployment)
    if fitting < 1:
        held_bytes, memory_bytes = _attention_bytes(view, deployment)
        needed = held_bytes + count * view.context_tokens * view.model.kv_bytes_per_token
        return Shortfall(deployment, "attention memory", needed, memory_bytes)
    alone_s = iteration_s(view, deployment, 1)
    if alone_s > view.slo_tpot_s:
        return Shortfall(deployment, "slo", alone_s, view.slo_tpot_s)
    most = largest(fitting, lambda tokens: iteration_s(view, deployment, tokens) <= view.slo_tpot_s)
    return plan_of(view, deployment, most, "memory" if most == fitting else "slo")


def fitting_tokens(view: PlanView, deployment: Deployment) -> int:
    """Requests of one micro-batch whose KV an attention node has room for (equation 8)."""
    held_bytes, memory_bytes = _attention_bytes(view, deployment)
    request_bytes = view.context_tokens * view.model.kv_bytes_per_token
    fitting = (memory_bytes - held_bytes) // (deployment.num_micro_batches * request_bytes)
    return min(int(fitting), MOST_NODE_TOKENS)


def largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 0 to `most` for which something holds that holds for all below."""
    low, high = 0, max(most, 0)
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _attention_bytes(view: PlanView, deployment: Deployment) -> tuple[float, float]:
    """Weights on an attention node, and its memory."""
    attention, experts, _ = deployment
    held_bytes = view.model.attention_bytes
    if experts is None:
        all_experts = view.model.num_experts * view.model.expert_bytes
        held_bytes += all_experts * attention.tp_size / attention.num_gpus
    return held_bytes, attention.tp_size * _gpu(view.attention, attention).memory_bytes


def plan_of(view: PlanView, deployment: Deployment, node_tokens: int, bound: str) -> Plan:
    """The plan with so many requests of each micro-batch on each attention node."""
    attention, experts, count = deployment
    cost = attention.num_gpus * _gpu(view.attention, attention).cost
    if experts is not None:
        cost += experts.num_gpus * _gpu(view.experts, experts).cost
    return Plan(
        deployment,
        node_tokens * count * attention.num_nodes,
        view.estimator.stages(deployment, node_tokens, view.context_tokens),
        iteration_s(view, deployment, node_tokens),
        cost,
        bound,
    )


def iteration_s(view: PlanView, deployment: Deployment, node_tokens: int) -> float:
    """Seconds until every request has its next token.

    Of the lm_head that of the last micro-batch is never hidden; those of the others are, as far as
    they take no longer than a station's turn.
    """
    stages = view.estimator.stages(deployment, node_tokens, view.context_tokens)
    outside_s = view.estimator.outside_s(deployment, node_tokens)
    count = deployment.num_micro_batches
    turn_s = max(stages.compute_s, stages.transfer_s)
    waiting_s = (count - 1) * max(outside_s - turn_s, 0.0)
    return total_s(stages, count, view.model.num_layers) + outside_s + waiting_s


def best(found: Iterable[Plan | Shortfall], what: str) -> Plan:
    """The plan with most tokens per cost; of equals, the first.

    Raises:
        ValueError: there is none; names the deployment that came nearest.
    """
    plans: list[Plan] = []
    lacking: list[Shortfall] = []
    for one in found:
        if isinstance(one, Plan):
            plans.append(one)
        else:
            lacking.append(one)
    if plans:
        return max(plans, key=lambda plan: plan.tokens_per_s_per_cost)
    refuse(lacking, what)


def refuse(lacking: list[Shortfall], what: str) -> NoReturn:
    """Say which bound binds in the deployment that came nearest.

    Raises:
        ValueError: always.
    """
    if not lacking:
        raise ValueError(f"{what}: there is no deployment to try; allow more sizes")
    nearest = min(lacking, key=lambda one: one.times)
    raise ValueError(
        f"{what}: none of {len(lacking)} deployments serves a single request; nearest is "
        f"{nearest}; allow other GPUs or sizes, or a longer slo.tpot_s"
    )


def _expert_shortfall(view: PlanView, deployment: Deployment, experts: Part) -> Shortfall | None:
    each = -(-view.model.num_experts // experts.num_nodes)
    needed = each * view.model.expert_bytes
    allowed = experts.tp_size * _gpu(view.experts, experts).memory_bytes
    return Shortfall(deployment, "expert memory", needed, allowed) if needed > allowed else None


def _gpu(choices: tuple[GpuType, ...], part: Part) -> GpuType:
    return next(one for one in choices if one.name == part.gpu)

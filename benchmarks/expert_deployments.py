"""Deployments of a mixture of experts that papers compare, at their largest batch within the SLO.

Run by itself: nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from hardware_models.parts import load_node
from hardware_models.schema import Node
from sim.api import run
from sim.costs.expert_nodes import ElementTypes
from sim.costs.link_collectives import NCCL
from sim.engine import Engine
from sim.expert_costs import DeploymentCosts
from sim.expert_setup import gpu_type, prepare_experts, sizes_of
from sim.experts import Experts, PlanCost
from sim.lanes import num_lanes
from sim.metrics import Slo
from sim.models.architecture import load_architecture
from sim.models.work import IterationShape
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.policies.micro_batching.none import WholeBatch
from sim.policies.micro_batching.ping_pong import PingPong
from sim.policies.parallel_plan._largest_batch import largest
from sim.policies.parallel_plan.base import Deployment, ParallelPlan, Plan, PlanEstimator, PlanView
from sim.policies.parallel_plan.disaggregated import Disaggregated
from sim.policies.parallel_plan.expert_parallel import ExpertParallel
from sim.policies.parallel_plan.expert_plan_search import ExpertPlanSearch
from sim.scenario import Model, Policies, Scenario
from sim.setup import prepare
from sim.state.ping_pong import StageSeconds
from sim.workload.poisson import Poisson

SLO_S = 0.15
"""TPOT of the paper's evaluation."""
CONTEXT = 571 + 159 / 2
"""Of a decoding request: the median prompt and half of the median answer; means are unknown."""
TYPES = ElementTypes("bf16", 2, 2)
MOST_SEQS = 4096
"""Seats of the tensor baseline; it fills fewer."""
BLOCK, STEPS = 16, 8
"""Tokens of a KV block, and iterations that are simulated with loads drawn by chance."""


class Served(NamedTuple):
    """What a replica of the tensor baseline decodes at its largest batch."""

    batch: int
    tokens_per_s: float
    tokens_per_s_per_gpu: float


class Case(NamedTuple):
    """Where a model is planned."""

    model: str
    attention: tuple[str, ...] = ("a100_80g_x8",)
    experts: tuple[str, ...] = ()
    """Empty: the same nodes as for attention."""
    cost: PlanCost = PlanCost.gpus


def scenario_of(case: Case, plan: ParallelPlan) -> Scenario:
    """A study of a case under a plan."""
    return Scenario(
        model=Model(name=case.model),
        node=load_node(case.attention[0]),
        workload=Poisson(rate_per_s=1.0, num_requests=1, input_tokens=571, output_tokens=159),
        policy=Policies(parallel_plan=plan),
        experts=Experts(
            attention_nodes=list(case.attention),
            expert_nodes=list(case.experts),
            plan_cost=case.cost,
            context_tokens=CONTEXT,
        ),
        slo=Slo(tpot_s=SLO_S),
    )


def planned(case: Case, plan: ParallelPlan) -> Plan:
    """What a rule plans for a case."""
    architecture = load_architecture(case.model)
    scenario = scenario_of(case, plan)
    return prepare_experts(scenario, architecture, architecture.max_position_embeddings).plan


def view_of(case: Case, estimator: PlanEstimator | None = None) -> PlanView:
    """What a rule sees of a case, for those who want all that it tried."""
    architecture = load_architecture(case.model)
    settings = Experts(plan_cost=case.cost)
    sides = [
        tuple(gpu_type(load_node(name), architecture, settings) for name in names)
        for names in (case.attention, case.experts or case.attention)
    ]
    return PlanView(
        sizes_of(architecture, TYPES), *sides, CONTEXT, SLO_S, estimator or costs_of(case)
    )


def costs_of(case: Case, *, ideal: bool = False, fused: bool = True) -> DeploymentCosts:
    """Seconds by datasheets; not fused: exchanges inside a node are not hidden."""
    nodes = [load_node(name) for name in {*case.attention, *case.experts}]
    by_gpu = {node.gpu.name: node for node in nodes if node.gpu is not None}
    costs = DeploymentCosts(load_architecture(case.model), by_gpu, TYPES, ideal=ideal)
    if not fused:
        attention, experts = costs.attention_node, costs.expert_node
        costs.attention_node = lambda gpus, _: attention(gpus, False)
        costs.expert_node = lambda gpus, _: experts(gpus, False)
    return costs


def tried(
    case: Case, estimator: PlanEstimator | None = None, rule: ExpertPlanSearch | None = None
) -> list[Plan]:
    """All deployments of a search that serve anything."""
    found = (rule or ExpertPlanSearch()).tried(view_of(case, estimator))
    return [plan for plan in found if isinstance(plan, Plan)]


def by_pair(plans: Sequence[Plan]) -> dict[tuple[str, str], Plan]:
    """The best plan of each pair of GPUs for attention and for experts, the best pair first."""
    best: dict[tuple[str, str], Plan] = {}
    for plan in sorted(plans, key=lambda one: -one.tokens_per_s_per_cost):
        attention, experts, _ = plan.deployment
        if experts is not None:
            best.setdefault((attention.gpu, experts.gpu), plan)
    return best


def expert_parallel(case: Case, num_gpus: int) -> Plan:
    """Tensor and expert parallelism as TensorRT-LLM runs them, on so many GPUs."""
    return planned(case, ExpertParallel(num_gpus=num_gpus, attention_tp=8))


def tensor(model: str, node: Node, pp_size: int = 1) -> Served:
    """Tensor parallelism over a node, and pipeline parallelism over several, as vLLM runs them.

    Stages are taken to hand over inside a node, which is a thousandth of the time. A batch is in
    flight for each, and each has its share of the KV.
    """
    node = replace(node, num_gpus=8 * pp_size)
    engine = Engine(max_num_seqs=MOST_SEQS, max_num_batched_tokens=MOST_SEQS)
    scenario = Scenario(
        model=Model(name=model), node=node, tp_size=8, pp_size=pp_size, engine=engine,
        workload=Poisson(rate_per_s=1.0, num_requests=1, input_tokens=571, output_tokens=159),
    )  # fmt: skip
    setup = prepare(scenario)
    lanes = num_lanes(None, pp_size)

    def iteration_s(requests: int) -> float:
        context = int(requests * CONTEXT)
        return setup.cost.iteration_s(IterationShape(0, 0, 0, 0, requests, context, requests))

    room = int(setup.limits.num_blocks * setup.limits.block_size // CONTEXT)
    most = largest(min(room, setup.limits.max_num_seqs), lambda one: iteration_s(one) <= SLO_S)
    assert most < setup.limits.max_num_seqs, "the seats bind; give it more"
    tokens_per_s = lanes * most / iteration_s(most)
    return Served(lanes * most, tokens_per_s, tokens_per_s / node.num_gpus)


class OverNccl(NamedTuple):
    """A `PlanEstimator` whose transfers NCCL carries: a launch, and a share of the bandwidth."""

    costs: DeploymentCosts

    def stages(
        self, deployment: Deployment, node_tokens: int, context_tokens: float
    ) -> StageSeconds:
        """See `PlanEstimator`."""
        stages = self.costs.stages(deployment, node_tokens, context_tokens)
        latency_s = sum(port.latency_s for port in self.costs.ports(deployment)) / 2
        moving_s = (stages.transfer_s - latency_s) / NCCL.bandwidth_share
        return stages._replace(transfer_s=NCCL.launch_s + latency_s + moving_s)

    def outside_s(self, deployment: Deployment, node_tokens: int) -> float:
        """See `PlanEstimator`."""
        return self.costs.outside_s(deployment, node_tokens)


def drawn(case: Case, plan: Plan) -> float:
    """Tokens/s of a plan at its batch where the loads of experts are drawn by chance.

    A plan takes every expert to have as many rows as another.
    """
    attention, experts, count = plan.deployment
    rule: ParallelPlan = ExpertParallel(num_gpus=plan.num_gpus, attention_tp=attention.tp_size)
    if experts is not None:
        rule = Disaggregated(
            attention_tp=attention.tp_size, num_attention_nodes=attention.num_nodes,
            expert_tp=experts.tp_size, num_micro_batches=count, attention_gpu=attention.gpu,
            expert_gpu=experts.gpu,
        )  # fmt: skip
    scenario = scenario_of(case, rule)
    tokens = int(CONTEXT) // BLOCK * BLOCK
    scenario.workload = Poisson(
        rate_per_s=1e9, num_requests=plan.batch, input_tokens=tokens - STEPS, output_tokens=STEPS
    )
    scenario.policy.batching = ChunkedPrefill()
    scenario.policy.micro_batching = PingPong() if experts is not None else WholeBatch()
    return plan.batch / run(scenario)["tpot_p50_s"]

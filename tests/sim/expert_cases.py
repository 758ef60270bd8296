"""What the tests of plans that place experts share: scenarios, and estimators that are lines."""

from dataclasses import dataclass

from hardware_models.parts import load_node
from sim.experts import Experts
from sim.metrics import Slo
from sim.policies.parallel_plan.base import Deployment, GpuType, ModelSizes, ParallelPlan, PlanView
from sim.policies.parallel_plan.disaggregated import Disaggregated
from sim.scenario import Model, Policies, Scenario
from sim.state.ping_pong import StageSeconds
from sim.workload.poisson import Poisson


def placed(plan: ParallelPlan | None = None, *, rules: dict | None = None, **fields) -> Scenario:
    """A small scenario whose plan places experts; on machines of H20 unless `experts` says else."""
    plan = plan or Disaggregated(attention_tp=2, num_attention_nodes=2, expert_tp=2)
    base = {
        "model": Model(name="mixtral_8x22b"),
        "node": load_node("h20_x8"),
        "workload": Poisson(rate_per_s=40.0, num_requests=60, input_tokens=300, output_tokens=20),
        "experts": Experts(context_tokens=300),
        "slo": Slo(tpot_s=0.15),
        "policy": Policies(parallel_plan=plan, **(rules or {})),
    }
    return Scenario(**(base | fields))


@dataclass(frozen=True)
class Lines:
    """Times that grow by straight lines: T_a = k1 b_a + k2 and T_e = k3 b_e + k4, over GPUs."""

    model: ModelSizes
    k1: float
    k2: float
    k3: float
    k4: float
    row_s: float = 0.0
    """Of a transfer, for each row that an expert gets."""
    sampled_s: float = 0.0
    """Outside of the layers, for each request."""

    def stages(
        self, deployment: Deployment, node_tokens: int, context_tokens: float
    ) -> StageSeconds:
        del context_tokens
        attention, experts, _ = deployment
        part = experts or attention
        model = self.model
        rows = node_tokens * attention.num_nodes * model.experts_per_token / model.num_experts
        return StageSeconds(
            (self.k1 * node_tokens + self.k2) / attention.tp_size,
            (self.k3 * rows + self.k4) / part.tp_size,
            self.row_s * rows,
        )

    def outside_s(self, deployment: Deployment, node_tokens: int) -> float:
        del deployment
        return self.sampled_s * node_tokens


GPU = GpuType("one", 1000.0, 1.0, (1, 2))


def linear_view(lines: Lines, slo_tpot_s: float = 1.0, **fields) -> PlanView:
    """A search among GPUs of one kind, for requests of 2 bytes of KV."""
    view = PlanView(lines.model, (GPU,), (GPU,), 1.0, slo_tpot_s, lines)
    return view._replace(**fields)

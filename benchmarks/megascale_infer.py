"""How near do simulated attention and expert nodes come to MegaScale-Infer's published figures?

Every verified figure of the paper (arXiv 2504.02263) that a simulation can have, beside ours.
Nothing is fitted. What the paper leaves open is ours: profiles of kernels and links (datasheets,
and the shares of their peaks that kernels and NCCL reach), the mean context of a request (its
median prompt and half of its median answer), and the plans. Ratios that the paper gives as "up to"
are ceilings of ours. Figures marked "derived" follow from the paper's own numbers: they check
that the pipeline is counted as the paper does, and say nothing of our costs.

    python benchmarks/megascale_infer.py [--requests 10000]
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
from expert_deployments import (
    SLO_S,
    Case,
    OverNccl,
    by_pair,
    costs_of,
    drawn,
    expert_parallel,
    tensor,
    tried,
    view_of,
)
from expert_messages import deepep, messages, sizes
from published import Report, at, below, up_to
from rich.console import Console
from rich.progress import Progress

from hardware_models.parts import load_gpu, load_node
from sim.api import run
from sim.expert_setup import plan_cost
from sim.experts import PlanCost
from sim.metrics import Slo
from sim.models.architecture import load_architecture
from sim.policies.batching.chunked_prefill import ChunkedPrefill
from sim.policies.micro_batching.ping_pong import PingPong
from sim.policies.parallel_plan.base import Plan
from sim.policies.parallel_plan.disaggregated import Disaggregated
from sim.processes.stations import StageTimes, iteration_s
from sim.scenario import Model, Policies, Scenario
from sim.state.ping_pong import (
    StageSeconds,
    hidden_total_s,
    hides_transfers,
    least_micro_batches,
)
from sim.workload.lengths import LengthDistribution
from sim.workload.poisson import Poisson

MODELS = {"mixtral_8x22b": 8, "dbrx": 8, "scaled_moe": 16}
"""And the GPUs of their baselines: the last one needs two nodes."""
NAMES = {"mixtral_8x22b": "Mixtral", "dbrx": "DBRX", "scaled_moe": "Scaled-MoE"}
GAINS = {"mixtral_8x22b": (1.10, 0.10), "dbrx": (1.28, 0.28), "scaled_moe": (1.38, 0.38)}
"""Fig. 14: from two to three micro-batches, and T_c / T_f that follows from it."""
TABLE_3 = ("l20_x8", "h800_sxm_x8", "a800_80g_x8", "h20_x8", "l40s_x8")
TESTBED_GPUS = 64
"""Eight nodes of eight."""
AIM_S = 30.0
"""Wall time of 10,000 requests."""


def pipeline(report: Report) -> None:
    """Equations of section 4.1, and the gains of Fig. 14 that follow from them."""
    right = [
        least_micro_batches(share / 100) == (3 if share <= 50 else 4) for share in range(1, 101)
    ]
    what = "least m, cases right"
    report.add("Eq. 3", what, at(1.0), float(np.mean(right)), "{:.0%}")
    ratios: list[float] = []
    rng = np.random.default_rng(0)
    while len(ratios) < 300:
        stages = StageSeconds(*rng.uniform(1, 100, 2), rng.uniform(0, 50))
        sizes = int(rng.integers(1, 60)), int(rng.integers(1, 6))
        if hides_transfers(stages, sizes[1]):
            took_s = iteration_s(StageTimes.alike(*stages, sizes))
            ratios.append(took_s / hidden_total_s(stages, sizes[1], sizes[0]))
    report.add("Eq. 5", "events over closed form", at(1.0), ratios, "{:.6f}")
    for model, (gain, share) in GAINS.items():
        rate = [rates(model, share, count) for count in (1, 2, 3, 4)]
        for index, published in ((0, 1.9), (1, gain), (2, 1.0)):
            what = f"{NAMES[model]}, m {index + 1} to {index + 2}, derived"
            report.add("Fig. 14", what, at(published), rate[index + 1] / rate[index])


def rates(model: str, share: float, count: int) -> float:
    """Micro-batches a unit of time, of which attention and experts take one each."""
    layers = load_architecture(model).num_layers
    return count / iteration_s(StageTimes.alike(1.0, 1.0, share, (layers, count)))


def attention_copies(report: Report) -> None:
    """DBRX with more and more attention nodes (Fig. 15)."""
    layers, numbers, where = load_architecture("dbrx").num_layers, (1, 2, 4, 8, 16), "Fig. 15"
    # One more request adds twice as much to T_a as one more row to T_e; K / E is 1 / 4.
    took = {n: iteration_s(StageTimes.alike(1.0, n / 8, 0.28, (layers, 3))) for n in numbers}
    per_gpu = {n: n / took[n] / (n + 16) for n in numbers}
    report.add(where, "best number of copies, derived", at(8), best_of(per_gpu), "{:.0f}")
    report.add(where, "latency, 4 copies over 1, derived", at(1.0), took[4] / took[1])
    case = Case("dbrx")
    for size in (1, 2, 4, 8):
        costs, found = costs_of(case), dict[int, Plan]()
        for n in numbers:
            rule = Disaggregated(attention_tp=size, expert_tp=size, num_attention_nodes=n)
            found[n] = rule.plan(view_of(case, costs))
        ours = {n: plan.tokens_per_s_per_gpu for n, plan in found.items()}
        what = f"best by our costs, {size} a node"
        report.add(where, what, at(8), best_of(ours), "{:.0f}")
        for n, value in ours.items():
            report.note(f"fig 15 tokens per s per gpu tp {size} copies {n}", value)


def best_of(values: dict[int, float]) -> int:
    """The key of the largest."""
    return max(values, key=lambda one: values[one])


def gpu_choice(report: Report) -> None:
    """Of the GPUs of Table 3, which ones serve most tokens per price."""
    where = "Table 3"
    for model in MODELS:
        case = Case(model, TABLE_3, (), PlanCost.price)
        for what, ideal, fused in (
            ("fused", False, True),
            ("not fused", False, False),
            ("ideal peaks", True, True),
        ):
            pairs = by_pair(tried(case, costs_of(case, ideal=ideal, fused=fused)))
            (first, second), best = list(pairs)[:2], list(pairs.values())[:2]
            margin = best[0].tokens_per_s_per_cost / best[1].tokens_per_s_per_cost - 1
            right = first == ("h20", "l40s")
            report.rows.append(
                (where, f"{NAMES[model]}, {what}", "h20+l40s", "+".join(first),
                 f"{margin:+.1%} to {'+'.join(second)}")
            )  # fmt: skip
            report.note(f"table 3 {model} {what} as published", float(right))
            report.note(f"table 3 {model} {what} margin", margin)


def most(plans: list[Plan], limit: float = float("inf")) -> Plan:
    """The plan with most tokens per cost, of at most so many GPUs."""
    return max(
        (one for one in plans if one.num_gpus <= limit), key=lambda one: one.tokens_per_s_per_cost
    )


def per_gpu(report: Report) -> None:
    """Decoding on Ampere nodes at the largest batch within the SLO (Fig. 8a)."""
    node, where = load_node("a100_80g_x8"), "Fig. 8a"
    ratios: dict[str, tuple[float, ...]] = {}
    for model, gpus in MODELS.items():
        case, name = Case(model), NAMES[model]
        plans = tried(case)
        apart, tensored, spread = (
            most(plans, TESTBED_GPUS), tensor(model, node, gpus // 8), expert_parallel(case, gpus)
        )  # fmt: skip
        for what, one in (("apart", apart), ("TP", tensored), ("TP+EP", spread)):
            show(report, f"{name} {what}, batch {one.batch:,}", one.tokens_per_s_per_gpu)
        chance = [drawn(case, plan) / plan.num_gpus for plan in (apart, spread)]
        for what, value in zip(("apart", "TP+EP"), chance, strict=True):
            show(report, f"{name} {what}, drawn loads", value)
        far = most(plans)
        show(report, f"{name} apart, {far.num_gpus} GPUs", far.tokens_per_s_per_gpu)
        ours = apart.tokens_per_s_per_gpu
        ratios[model] = (
            ours / tensored.tokens_per_s_per_gpu, ours / spread.tokens_per_s_per_gpu,
            chance[0] / chance[1],
        )  # fmt: skip
    for models, bounds in (
        (("mixtral_8x22b", "dbrx"), (2.56, 1.28, 1.28)), (("scaled_moe",), (7.11, 1.90, 1.90)),
    ):  # fmt: skip
        names = " and ".join(NAMES[model] for model in models)
        for index, baseline in enumerate(("TP", "TP+EP", "TP+EP, drawn loads")):
            ours = [ratios[model][index] for model in models]
            report.add(where, f"{names} over {baseline}", up_to(bounds[index]), ours)


def show(report: Report, what: str, value: float) -> None:
    """Tokens/s a GPU of ours, beside which there are none."""
    report.rows.append(("Fig. 8a", what, "-", f"{value:,.0f}", "tokens/s a GPU"))
    report.note(f"fig 8a {what} tokens per s per gpu", value)


def per_cost(report: Report) -> None:
    """H20 and L40S per price and per watt, against baselines on H20 (Fig. 9a, 10)."""
    for where, cost, bounds in (
        ("Fig. 9a", PlanCost.price, (3.24, 1.86)), ("Fig. 10", PlanCost.power, (1.80, 1.80)),
    ):  # fmt: skip
        found = {model: _over_h20(model, cost) for model in MODELS}
        unit = "price" if cost is PlanCost.price else "watt"
        for index, what in enumerate(
            ("TP", "TP+EP", "TP, not fused", "TP+EP, not fused", "TP+EP, drawn loads")
        ):
            ours = [one[index] for one in found.values()]
            bound = bounds[0] if what.startswith("TP,") or what == "TP" else bounds[1]
            report.add(where, f"per {unit}, over {what}", up_to(bound), ours)
            for model, one in found.items():
                report.note(f"{where} {model} over {what}", one[index])


def _over_h20(model: str, cost: PlanCost) -> tuple[float, ...]:
    """Tokens per cost of H20 and L40S over those of TP and TP+EP on H20.

    Twice with even loads, exchanges in a node hidden or not, and once with loads drawn by chance.
    """
    node, gpus, each = load_node("h20_x8"), MODELS[model], plan_cost(load_gpu("h20"), cost)
    mixed, alone = Case(model, ("h20_x8",), ("l40s_x8",), cost), Case(model, ("h20_x8",))
    spread = expert_parallel(alone, gpus)
    best, slow = most(tried(mixed)), most(tried(mixed, costs_of(mixed, fused=False)))
    baselines = [
        one.tokens_per_s_per_gpu / each for one in (tensor(model, node, gpus // 8), spread)
    ]
    even = [
        plan.tokens_per_s_per_cost / baseline for plan in (best, slow) for baseline in baselines
    ]
    chance = drawn(mixed, best) / best.cost, drawn(alone, spread) / spread.num_gpus / each
    return *even, chance[0] / chance[1]


def ablation(report: Report) -> None:
    """Disaggregation alone, with NCCL between the nodes, and then M2N (Fig. 13)."""
    apart: list[float] = []
    faster: list[float] = []
    for model, gpus in MODELS.items():
        case = Case(model)
        theirs = most(tried(case, OverNccl(costs_of(case))), TESTBED_GPUS)
        ours = most(tried(case), TESTBED_GPUS)
        spread = expert_parallel(case, gpus)
        apart.append(theirs.tokens_per_s_per_gpu / spread.tokens_per_s_per_gpu)
        faster.append(ours.tokens_per_s_per_gpu / theirs.tokens_per_s_per_gpu)
        report.note(f"fig 13 {model} nccl over colocated", apart[-1])
        report.note(f"fig 13 {model} m2n over nccl", faster[-1])
    report.add("Fig. 13", "apart with NCCL over TP+EP", up_to(4.66), apart)
    report.add("Fig. 13", "M2N over NCCL", up_to(1.53), faster)


def speed(report: Report, num_requests: int) -> None:
    """Wall time of a simulation of Mixtral-8x22B on 8 + 8 nodes of eight GPUs."""
    scenario = Scenario(
        model=Model(name="mixtral_8x22b"),
        node=load_node("a100_80g_x8"),
        workload=Poisson(
            rate_per_s=400, num_requests=num_requests, input_tokens=638, output_tokens=178,
            lengths=LengthDistribution.lognormal, length_cv=0.5,
        ),
        policy=Policies(
            batching=ChunkedPrefill(), parallel_plan=Disaggregated(num_attention_nodes=8),
            micro_batching=PingPong(),
        ),
        slo=Slo(tpot_s=SLO_S),
    )  # fmt: skip
    begin = time.perf_counter()
    run(scenario)
    took_s = time.perf_counter() - begin
    report.add("our aim", f"{num_requests:,} requests, 8+8 nodes (s)", below(AIM_S), took_s)


GROUPS: dict[str, Callable[[Report], None]] = {
    "pipeline": pipeline,
    "attention copies": attention_copies,
    "choice of GPUs": gpu_choice,
    "per GPU": per_gpu,
    "per price and watt": per_cost,
    "ablation": ablation,
    "messages": messages,
    "DeepEP": deepep,
    "sizes": sizes,
}


def main() -> None:
    """Simulate, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description="MegaScale-Infer: published, simulated")
    parser.add_argument("--requests", type=int, default=10_000, help="of the timed simulation")
    options = parser.parse_args()
    report = Report()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(GROUPS) + 1)
        for name, measure in GROUPS.items():
            progress.update(task, description=name)
            measure(report)
            progress.advance(task)
        progress.update(task, description="speed")
        speed(report, options.requests)
        progress.advance(task)
    report.show("MegaScale-Infer: published and simulated")
    print(json.dumps(report.figures))


if __name__ == "__main__":
    main()

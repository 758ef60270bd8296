"""What a knowledge cache settles before a run: tiers and search. Refuses what cannot run."""

from collections.abc import Callable

import numpy as np

from hardware_models.schema import Node
from sim.costs.base import IterationCost
from sim.generations import MAX_STAGES, prompt_tokens, questions
from sim.knowledge_mishaps import Mishaps
from sim.knowledge_rules import Rules, Tiers
from sim.metrics import request_times
from sim.models.work import IterationShape
from sim.node_choice import node_of
from sim.policies.estimate import PrefillProfile
from sim.policies.instance_plan.base import phases
from sim.processes.exact_time import ExactEnvironment
from sim.processes.knowledge_cache import Search, simulate_knowledge
from sim.processes.network import Network
from sim.processes.pace import Costed
from sim.scenario import Scenario
from sim.setup import Setup
from sim.state.links import Routes
from sim.trace import Trace
from sim.units import GIB
from sim.workload.knowledge import KnowledgeWorkload, check_retrieved


def retrieves(scenario: Scenario) -> bool:
    """Whether the requests of a scenario have documents retrieved for them."""
    return isinstance(scenario.workload, KnowledgeWorkload)


def knowledge_workload(scenario: Scenario) -> KnowledgeWorkload:
    """The workload of a scenario that retrieves."""
    assert isinstance(scenario.workload, KnowledgeWorkload)
    return scenario.workload


def rules_of(scenario: Scenario) -> Rules:
    """The decisions of its knowledge cache."""
    policy = scenario.policy
    return Rules(
        policy.batching, policy.cache_eviction, policy.request_order, policy.retrieval_overlap
    )


def tiers_of(scenario: Scenario, setup: Setup, seed: int) -> Tiers:
    """Sizes and costs of the tiers of a scenario."""
    knowledge, limits = scenario.knowledge, setup.limits
    block_bytes = limits.block_size * setup.kv_bytes_per_token
    return Tiers(
        documents=knowledge_workload(scenario).documents(seed),
        host_blocks=knowledge.host_bytes // block_bytes,
        prefill_s=estimator_of(setup.cost, setup.max_model_tokens).seconds,
        copy_s=_copy_s(scenario, block_bytes),
        reuse=knowledge.reuse,
        replicate_from=knowledge.replicate_from,
    )


def mishaps_of(scenario: Scenario) -> Mishaps:
    """What goes wrong in mid-run."""
    knowledge = scenario.knowledge
    return Mishaps(tuple(knowledge.gpu_lost_s), knowledge.gpu_restart_s, knowledge.timeout_s)


def search_of(scenario: Scenario, num_documents: int) -> Search:
    """How long the searches of a scenario take."""
    knowledge = scenario.knowledge
    if knowledge.num_vectors is not None and knowledge.num_vectors < num_documents:
        raise ValueError(
            f"knowledge.num_vectors={knowledge.num_vectors} must be at least the {num_documents} "
            "documents; each has a vector"
        )
    return Search(
        knowledge.scan_s(num_documents), knowledge.stage_overhead_s, knowledge.search_cores
    )


def estimator_of(cost: IterationCost, max_tokens: int) -> PrefillProfile:
    """What policies know of prefills: the cost on a grid, as an engine would profile itself."""

    def prefill_s(cached_tokens: int, new_tokens: int) -> float:
        return cost.iteration_s(IterationShape.of([(new_tokens, cached_tokens)], [], 1))

    return PrefillProfile.measured(prefill_s, max_tokens)


def simulate_knowledge_seed(scenario: Scenario, setup: Setup, seed: int) -> Trace:
    """The trace of one run of a scenario that retrieves.

    Raises:
        ValueError: no client waited for its answer.
    """
    tiers, timeout_s = tiers_of(scenario, setup, seed), scenario.knowledge.timeout_s
    trace = simulate_knowledge(
        questions(knowledge_workload(scenario), seed, setup.max_model_tokens),
        rules_of(scenario), setup.limits, Costed(setup.cost), tiers,
        search_of(scenario, len(tiers.documents)), mishaps=mishaps_of(scenario),
    )  # fmt: skip
    if timeout_s is not None and not len(request_times(trace).request):
        raise ValueError(
            f"knowledge.timeout_s={timeout_s}: every client left before it had its full answer, so "
            "that there is nothing to sum up; let them wait longer, or ask for less"
        )
    return trace


def check_knowledge(scenario: Scenario, setup: Setup, seed: int) -> None:
    """Refuse what a knowledge cache cannot do, and requests that do not fit at some stage.

    Raises:
        ValueError: what is wrong, with the value, the rule and the way out.
    """
    _check_deployment(scenario, setup)
    workload = knowledge_workload(scenario)
    documents, start = workload.documents(seed), 0
    search_of(scenario, len(documents))
    for columns in workload.columns(seed):
        check_retrieved(columns, documents, start)
        start += len(columns)
    most = min(setup.max_model_tokens, setup.limits.num_blocks * setup.limits.block_size)
    for one in questions(workload, seed, setup.max_model_tokens):
        request = one.request
        if len(one.stages) > MAX_STAGES:
            raise ValueError(
                f"request {request.request_id} is searched in {len(one.stages)} stages and "
                f"{MAX_STAGES} are the most; take fewer"
            )
        for found in set(one.stages[:-1]):
            need = prompt_tokens(one, found, documents.tokens) + request.output_tokens
            if need > most:
                raise ValueError(
                    f"request {request.request_id} with documents {list(found)}, which a stage of "
                    f"its search finds, needs {need} tokens and at most {most} fit; shorten "
                    "documents (workload.max_document_tokens), or take policy/retrieval_overlap="
                    "none with shorter ones"
                )


def _check_deployment(scenario: Scenario, setup: Setup) -> None:
    """Refuse what a knowledge cache is not combined with.

    Raises:
        ValueError: names it, and what to take.
    """
    plan, engine = scenario.policy.instance_plan, scenario.engine
    apart = bool(phases(plan, scenario.num_replicas)[1])
    refused = [
        (scenario.num_replicas > 1, f"num_replicas={scenario.num_replicas}", "num_replicas=1"),
        (apart, f"instance plan {type(plan).__name__}", "policy/instance_plan=colocated"),
        (setup.lanes > 1, f"pp_size={scenario.pp_size} and {setup.lanes} batches in flight",
         "engine.batches_in_flight=1"),
        (bool(scenario.faults), f"faults={scenario.faults}", "faults=[]"),
        (engine.schedules_ahead, "engine.schedules_ahead=true", "engine.schedules_ahead=false"),
        (engine.prefix_caching, "engine.prefix_caching=true", "engine.prefix_caching=false"),
    ]  # fmt: skip
    for holds, value, instead in refused:
        if holds:
            raise ValueError(
                f"workload {type(scenario.workload).__name__} retrieves documents, and a replica "
                f"with a knowledge cache is not combined with {value}; take {instead}"
            )


def _copy_s(scenario: Scenario, block_bytes: int) -> Callable[[int], float]:
    """Seconds to copy blocks between host and GPUs: all ranks copy their shares at once.

    Nothing else is on the links then, as the batch waits for its copies: so the time is that of
    these flows alone, a latency and a rate.
    """
    node, ranks = node_of(scenario), scenario.tp_size * scenario.pp_size
    if node.host_link is None:
        if scenario.knowledge.reuse and scenario.knowledge.host_bytes:
            raise ValueError(
                "knowledge.host_bytes keeps KV in host memory, and the machine has no host_link; "
                "name a node with one, or take knowledge.host_bytes=0"
            )
        return lambda blocks: 0.0
    latency_s = _flows_s(node, ranks, 0.0)
    byte_s = (_flows_s(node, ranks, GIB) - latency_s) / GIB
    return lambda blocks: latency_s + blocks * block_bytes / ranks * byte_s


def _flows_s(node: Node, ranks: int, num_bytes: float) -> float:
    """Seconds in which so many GPUs of a node send so many bytes each to host memory at once."""
    environment = ExactEnvironment()
    routes = Routes(node)
    end = "cpu" if node.host_memory is None else "host_memory"
    paths = np.stack([routes.path(f"gpu{rank}", end) for rank in range(ranks)])
    environment.run(until=Network(environment, routes).send(paths, num_bytes))
    return environment.now

"""How long do the decisions of a knowledge cache take, and how fast is it simulated?

Decisions: the wall time a request of lookup, holding, storing, evicting and releasing in a tree of
which 100,000 nodes have been used; of putting a queue in order; and of deciding on all stages of a
search. RAGCache's Table 4 has each below 1 ms. Simulation: seconds and peak memory of requests over
300,000 documents, in a process of its own. Figures of the cache itself: `ragcache.py`.

    python benchmarks/ragcache_speed.py [--requests 100000] [--nodes 100000] [--timed 20000]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from published import Report, below
from ragcache import CONTEXT, Point, study

from sim.generations import Generations, Question, questions
from sim.knowledge_rules import tree_of
from sim.knowledge_setup import knowledge_workload, rules_of, simulate_knowledge_seed, tiers_of
from sim.policies.request_order.base import in_order
from sim.policies.request_order.cache_aware import CacheAware
from sim.policies.retrieval_overlap.speculative import Speculative
from sim.scenario import Scenario
from sim.setup import Setup, prepare
from sim.state.knowledge_prefixes import KnowledgePrefixes
from sim.units import GB, KIB, MS

QUEUE = 32
"""Requests that wait when the queue is put in order."""
MANY = 1_000_000
"""Requests that the aims of the simulation are about."""
AIM_S, AIM_GB = 120.0, 4.0
LARGE = Point(reorders=True, num_documents=300_000)
"""The small testbed over the whole corpus."""
BLOCK = 16
"""Tokens of a KV block: the engine's."""
Seconds = NDArray[np.float64]


def main() -> None:
    """Measure, print the table and, last, one JSON line."""
    parser = argparse.ArgumentParser(description="Wall time of a knowledge cache")
    parser.add_argument("--requests", type=int, default=100_000, help="that are simulated")
    parser.add_argument("--nodes", type=int, default=100_000, help="of the tree")
    parser.add_argument("--timed", type=int, default=20_000, help="requests that are decided on")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(simulated(options.requests)))
        return
    report = Report()
    for what, took_s in decisions(options.nodes, options.timed).items():
        for name, value in (("mean", took_s.mean()), ("p99", np.percentile(took_s, 99))):
            report.add("Table 4", f"{what}, {name} (ms)", below(1.0), float(value / MS), "{:.3f}")
    found = in_child()
    count = options.requests
    aimed = "" if count == MANY else f", extrapolated from {count:,}"
    whole_s = found["sim_s"] * MANY / count
    report.add("our aim", f"{MANY:,} requests{aimed} (s)", below(AIM_S), whole_s, "{:.0f}")
    report.add("our aim", f"peak memory, {count:,} requests (GB)", below(AIM_GB), found["peak_gb"])
    report.show(f"A knowledge cache over {LARGE.num_documents:,} documents", "published, or aim")
    print(json.dumps(report.figures | found))


def decisions(num_nodes: int, num_timed: int) -> dict[str, Seconds]:
    """Seconds of each decision, a request or, for the queue, a batch."""
    scenario = study(LARGE, 4 * num_nodes + num_timed + QUEUE)
    setup = prepare(scenario)
    asked = questions(knowledge_workload(scenario), 0, setup.max_model_tokens)
    prefixes, pool = big_tree(scenario, setup, num_nodes), setup.limits.num_blocks
    while prefixes.tree.num_nodes < num_nodes:
        serve(prefixes, next(asked), pool)
    tree_s = [serve(prefixes, one, pool) for one in islice(asked, num_timed)]
    waiting = list(islice(asked, QUEUE))
    return {
        "tree, a request": np.array(tree_s),
        f"order of {QUEUE} waiting, a batch": np.array(order_s(prefixes, waiting)),
        "speculation, a request": np.array(speculation_s(scenario, num_timed)),
    }


def big_tree(scenario: Scenario, setup: Setup, num_nodes: int) -> KnowledgePrefixes:
    """An empty tree that has host memory for so many documents of mean length."""
    tiers = tiers_of(scenario, setup, 0)
    blocks = int(tiers.documents.tokens.mean()) // setup.limits.block_size
    tiers = tiers._replace(host_blocks=blocks * num_nodes)
    made = tree_of(rules_of(scenario), tiers, setup.limits.block_size)
    assert made is not None, "the study reuses"
    return made


def serve(prefixes: KnowledgePrefixes, question: Question, pool_blocks: int) -> float:
    """All that the tree does for one request that has the GPU to itself; wall seconds."""
    request = question.request.view()
    own = request.prompt_tokens // BLOCK + 1
    begin = time.perf_counter()
    prefixes.register(request.request_id, question.stages[-1])
    prefixes.cached(request)
    prefixes.shrink(pool_blocks - own)
    prefixes.hold(request)
    prefixes.store(request.request_id, request.prompt_tokens)
    prefixes.release(request.request_id)
    prefixes.forget(request.request_id)
    prefixes.take_lookups()
    prefixes.tree.take_moves()
    return time.perf_counter() - begin


def order_s(prefixes: KnowledgePrefixes, waiting: list[Question]) -> list[float]:
    """Wall seconds of looking up and sorting a queue, again and again."""
    rule = CacheAware()
    memory, found = rule.init(), list[float]()
    queue = [one.request.view() for one in waiting]
    for _ in range(1000):
        for one in waiting:  # anew, so that nothing is known from the last time
            prefixes.register(one.request.request_id, one.stages[-1])
        begin = time.perf_counter()
        in_order(rule, memory, queue, prefixes.cached)
        found.append(time.perf_counter() - begin)
    return found


def speculation_s(scenario: Scenario, num_timed: int) -> list[float]:
    """Wall seconds of deciding on all stages of each search, with nobody else waiting."""
    workload = knowledge_workload(scenario)
    generations = Generations(Speculative(), workload.documents(0))
    found: list[float] = []
    for question in islice(questions(workload, 0, CONTEXT), num_timed):
        begin = time.perf_counter()
        for stage in range(len(question.stages)):
            if generations.matters(question, stage):
                generations.staged(question, stage, 0)
        generations.answers(question)
        found.append(time.perf_counter() - begin)
    return found


def simulated(num_requests: int) -> dict[str, float]:
    """Seconds and peak memory of one simulation in this process, its workload included."""
    scenario = study(LARGE, num_requests)
    setup = prepare(scenario)
    begin = time.perf_counter()
    trace = simulate_knowledge_seed(scenario, setup, 0)
    sim_s = time.perf_counter() - begin
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / GB
    return {"sim_s": sim_s, "peak_gb": peak_gb, "num_iterations": trace.num_iterations}


def in_child() -> dict[str, float]:
    """The simulation in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()

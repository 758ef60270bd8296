"""Attention and expert ranks: what they refuse before they start, and how a lost one is told of."""

import os
import signal
import threading
import time

import pytest
from torch import multiprocessing

from backends import expert_serving, ranks
from backends.emulated_link import EmulatedLink
from backends.expert_serving import TINY, ExpertRun, serve_experts
from backends.sampling import Sampler
from backends.weights import shipped_config
from sim.engine import ReplicaLimits
from sim.policies.batching.continuous import Continuous
from sim.workload.closed_loop import ClosedLoop
from sim.workload.poisson import Poisson
from sim.workload.recorded import Recorded

LIMIT_S = 10.0
LIMITS = ReplicaLimits(8, 64, 16, 64)
LONG = Recorded(arrival_s=[0.0] * 4, prompt_tokens=[8] * 4, output_tokens=[200] * 4)
TINY_CONFIG = shipped_config(TINY)
QWEN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 256, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 8,
}  # fmt: skip


class Telling(Sampler):
    """Leaves a file behind when it is first asked: the ranks are in the middle of their work."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def __call__(self, logits, request_ids, positions):
        self.path.touch()
        return super().__call__(logits, request_ids, positions)


def run_of(**changed):
    fields = {
        "workload": LONG, "limits": LIMITS, "batching": Continuous(), "num_attention": 2,
        "num_expert_ranks": 1,
    }  # fmt: skip
    return ExpertRun(**(fields | changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "how", "message"),
    [
        (1, signal.SIGKILL, "rank 1 of 3 was killed by SIGKILL"),
        (2, signal.SIGKILL, "rank 2 of 3 was killed by SIGKILL"),
        (2, signal.SIGSTOP, r"rank 2 of 3 has not beaten for \d+ s; it was stopped"),
    ],
    ids=["attention killed", "experts killed", "experts stopped"],
)
def test_a_rank_lost_between_two_tokens_is_named_and_ends_the_run(
    who, how, message, monkeypatch, tmp_path
):
    """Deliveries are slow, so that it is nearly always lost while others wait for it."""
    told, processes, lost_s = tmp_path / "told", [], []
    start = ranks.start_processes

    def start_and_keep(*arguments, **options):
        context = start(*arguments, **options)
        processes.extend(context.processes)
        return context

    def lose():
        while not told.exists():
            time.sleep(0.01)
        time.sleep(0.1)
        lost_s.append(time.monotonic())
        os.kill(processes[who].pid, how)

    monkeypatch.setattr(ranks, "start_processes", start_and_keep)
    link = EmulatedLink(latency_s=0.05, bandwidth_bytes_per_s=1e9)
    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    with pytest.raises(ChildProcessError, match=message):
        serve_experts(run_of(link=link, sampler=Telling(told)))
    assert time.monotonic() - lost_s[0] < LIMIT_S
    assert multiprocessing.active_children() == []


LENGTHS = {"input_tokens": 8, "output_tokens": 8, "num_requests": 6}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_attention": 0}, "num_attention=0 must be at least 1"),
        ({"num_expert_ranks": 0}, "num_expert_ranks=0 must be at least 1"),
        ({"num_micro_batches": 0}, "num_micro_batches=0 must be at least 1"),
        ({"num_expert_ranks": 3}, "num_expert_ranks=3 must divide num_experts=8; take another"),
        ({"slots_per_node": 0}, "slots_per_node=0 must be at least 1"),
        ({"slots_per_node": 7}, "must hold all of num_experts=8; try slots_per_node=8"),
        ({"loads": [[1.0] * 8]}, "loads of 1 layers with 8 experts must be .* 2 layers"),
        ({"loads": [[1.0] * 6] * 2}, "loads of 2 layers with 6 experts must be .* with 8 experts"),
        ({"loads": [[1.0] * 8, [1.0] * 6]}, "loads of 2 layers with 6, 8 experts must be"),
        ({"config": shipped_config("tiny_llama")}, "has 2 layers without experts"),
        (
            {"config": QWEN | {"model_type": "qwen3_moe", "decoder_sparse_step": 2}},
            "has 1 layers without experts .* such as mixtral",
        ),
        (
            {
                "config": QWEN
                | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 56}
            },
            "shared_expert_intermediate_size=56",
        ),
        ({"weights": "nowhere"}, "model 'nowhere' is neither a folder"),
        (
            {"workload": ClosedLoop(num_clients=3, **LENGTHS)},
            "workload of 3 clients must be open-loop: .*; take workload=poisson",
        ),
        (
            {"workload": Recorded(arrival_s=[0.0], prompt_tokens=[8], output_tokens=[8],
                                  num_clients=1)},
            "workload of 1 clients",
        ),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_a_rank_is_started(changed, message, monkeypatch):
    def start(*arguments):
        raise AssertionError(f"started: {arguments}")

    monkeypatch.setattr(expert_serving, "run_ranks", start)
    with pytest.raises(ValueError, match=message):
        serve_experts(run_of(**changed))


def test_what_can_run_is_not_refused(monkeypatch):
    """The refusals above are of what they name, not of the rest of that run."""
    sizes = []

    def start(work, size, *arguments):
        sizes.append(size)
        raise InterruptedError

    monkeypatch.setattr(expert_serving, "run_ranks", start)
    for changed in (
        {"workload": Poisson(rate_per_s=1.0, **LENGTHS)},
        {"slots_per_node": 8, "loads": [[1.0] * 8] * 2},
        {"config": QWEN | {"model_type": "qwen3_moe"}},
    ):
        with pytest.raises(InterruptedError):
            serve_experts(run_of(**changed))
    assert sizes == [3, 3, 3]

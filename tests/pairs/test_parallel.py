"""A replica on several ranks gives one rank's tokens, and sends what is simulated."""

from collections import Counter

import numpy as np
import pytest

from backends.emulated_link import EmulatedLink
from backends.kv_cache import Corruption
from backends.parallel_serving import ParallelRun, serve_parallel
from backends.reference import KeepLogits
from backends.sampling import Sampler, Sampling
from backends.serving import open_model, serve, use_one_thread
from backends.tokenizer import Tokenizer
from backends.weights import shipped_config
from scenarios.validation import decisions, parallel
from scenarios.validation.numbers import all_at_once
from scenarios.validation.openings import TEXTS
from scenarios.validation.options import with_short_chunks
from scenarios.validation.verdict import Verdict
from sim.engine import ReplicaLimits
from sim.policies.registry import load_file, policies
from sim.trace import State
from sim.workload.recorded import Recorded
from sim.workload.source import Source

pytestmark = pytest.mark.slow
LIMITS = ReplicaLimits(8, 64, 16, 12)
FEW = Recorded(arrival_s=[0.0] * 12, prompt_tokens=list(range(5, 53, 4)), output_tokens=[14] * 12)
CONTEXT = 96


@pytest.fixture(scope="module")
def tiny():
    use_one_thread()
    return open_model("random", "cpu")[1]


def run_of(tp_size, pp_size, **changed):
    fields = {
        "weights": "random", "workload": FEW, "limits": LIMITS, "max_model_tokens": CONTEXT,
        "batching": policies("batching")["chunked_prefill"](chunk_tokens=24),
        "batches_in_flight": 1,
    }  # fmt: skip
    return ParallelRun(tp_size=tp_size, pp_size=pp_size, **(fields | changed))


@pytest.fixture(scope="module")
def alone(tiny):
    """One rank's answers and logits."""
    kept = KeepLogits()
    run = run_of(1, 1)
    served = serve(tiny, Source(FEW, 0, CONTEXT), run.batching, LIMITS, sampler=kept)
    return served, kept


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 2), (4, 1)])
def test_tokens_and_logits_are_those_of_one_rank(alone, tp_size, pp_size):
    served, kept = alone
    found = serve_parallel(run_of(tp_size, pp_size, sampler=KeepLogits()))
    assert found.served.answers == served.answers
    assert (found.served.trace.events["state"] == State.preempted).any(), "the pool must run out"
    assert set(found.sampler.logits) == set(kept.logits)
    furthest = max(
        float(np.abs(found.sampler.logits[place] - row).max()) for place, row in kept.logits.items()
    )
    # A stage boundary changes no bit; a sum over ranks is added up in another order.
    assert furthest == 0.0 if tp_size == 1 else 0.0 < furthest < 1e-4


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2)])
def test_draws_are_those_of_one_rank(tiny, tp_size, pp_size):
    sampler = Sampler(Sampling(temperature=0.8, top_p=0.95, seed=7))
    run = run_of(tp_size, pp_size, sampler=sampler)
    one = serve(tiny, Source(FEW, 0, CONTEXT), run.batching, LIMITS, sampler=sampler)
    assert serve_parallel(run).served.answers == one.answers


@pytest.mark.parametrize(
    ("rule", "tp_size", "pp_size"),
    [
        ("static", 1, 2),
        ("continuous", 2, 1),
        ("chunked_prefill", 2, 2),
    ],
)
def test_decisions_kv_bytes_and_sent_bytes_equal_the_simulated_ones(tiny, rule, tp_size, pp_size):
    batching = with_short_chunks(policies("batching")[rule]())
    run = run_of(
        tp_size, pp_size, batching=batching, workload=decisions.workload(24),
        limits=decisions.LIMITS, max_model_tokens=decisions.CONTEXT,
    )  # fmt: skip
    found = serve_parallel(run)
    again = decisions.replay(found.served.trace, batching, run.limits, decisions.CONTEXT)
    panels = decisions.Panels(found.served, again)
    line = decisions.decision_line(rule, panels)
    assert line.verdict is Verdict.passed, line.note
    for line in decisions.byte_lines(rule, panels, tiny.config):
        assert line.verdict is Verdict.passed, line
    lines = parallel.sent_lines(rule, found, again, tiny.config, run)
    assert len(lines) == (4 if tp_size > 1 else 0) + (2 if pp_size > 1 else 0)
    for line in lines:
        assert line.verdict is Verdict.passed, line
        assert line.simulated == line.measured != "0"


def test_every_rank_sends_its_own_part(tiny):
    found = serve_parallel(run_of(2, 2))
    rows = Counter((one.rank, one.peer, one.name) for one in found.sent)
    stages = {name: {rank for rank, _, what in rows if what == name} for _, _, name in rows}
    assert stages["embedding"] == {0, 1}
    assert stages["attention_output"] == stages["mlp_output"] == {0, 1, 2, 3}
    assert stages["logits"] == {2, 3}
    assert {pair[:2] for pair in rows if pair[2] == "hidden_states"} == {(0, 2), (1, 3)}
    assert {pair[:2] for pair in rows if pair[2] == "tokens"} == {(2, 0)}
    assert stages["orders"] == {0}


def test_a_corrupted_cache_is_caught_on_several_ranks(tiny):
    batching = with_short_chunks(policies("batching")["continuous"]())
    run = run_of(
        2, 1, batching=batching, workload=decisions.workload(32), limits=decisions.LIMITS,
        max_model_tokens=decisions.CONTEXT, corruption=Corruption(kind="skip_free", index=10),
    )  # fmt: skip
    lines = parallel.parallel_lines("continuous", run)
    assert lines[0].verdict is Verdict.missed


def test_what_does_not_divide_is_refused_before_a_rank_is_started():
    with pytest.raises(ValueError, match="tp_size=3 must divide num_heads=8"):
        serve_parallel(run_of(3, 1))
    with pytest.raises(ValueError, match="pp_size=3 must lie in 1 to the 2 layers"):
        serve_parallel(run_of(1, 3))
    with pytest.raises(ValueError, match="tp_size=2 must be 1 for mixtral: its 8 experts"):
        serve_parallel(run_of(2, 1, config=shipped_config("tiny_mixtral")))


def test_a_policy_that_overbooks_is_told_so_by_the_first_rank():
    with pytest.raises(ValueError, match="mend the policy"):
        serve_parallel(run_of(2, 1, limits=LIMITS._replace(num_blocks=3)))


@pytest.mark.parametrize(("tp_size", "pp_size"), [(3, 1), (1, 2)])
def test_smollm2_says_the_same_on_several_ranks(tp_size, pp_size):
    """9 heads and 3 KV heads divide by 3; 30 layers are 15 and 15."""
    use_one_thread()
    model, whole = open_model("smollm2", "cpu")
    texts = Tokenizer(model.folder)
    asked = [texts.encode(text) for text in TEXTS[:3]]
    workload = all_at_once(asked, 3)
    run = run_of(
        tp_size, pp_size, weights="smollm2", workload=workload, prompts=asked,
        limits=LIMITS._replace(num_blocks=8), sampler=KeepLogits(),
    )  # fmt: skip
    kept = KeepLogits()
    one = serve(
        whole, Source(workload, 0, CONTEXT), run.batching, run.limits,
        prompts=lambda request: asked[request.request_id], sampler=kept,
    )  # fmt: skip
    found = serve_parallel(run)
    assert found.served.answers == one.answers
    furthest = max(
        float(np.abs(found.sampler.logits[place] - row).max()) for place, row in kept.logits.items()
    )
    assert furthest == 0.0 if tp_size == 1 else 0.0 < furthest < 1e-3
    again = decisions.replay(found.served.trace, run.batching, run.limits, CONTEXT)
    for line in parallel.sent_lines("", found, again, model.config, run):
        assert line.verdict is Verdict.passed, line


def test_a_slow_link_changes_no_token_and_is_told_of(alone):
    link = EmulatedLink(latency_s=2e-4, bandwidth_bytes_per_s=1e9)
    found = serve_parallel(run_of(2, 1, link=link))
    assert found.served.answers == alone[0].answers
    assert found.link == "emulated"


OWN_POLICY = """
from dataclasses import dataclass, field

from sim.policies.batching.base import Batching
from sim.policies.batching.continuous import Continuous


@dataclass(kw_only=True)
class Mine(Batching):
    inner: Continuous = field(default_factory=Continuous)

    def next_batch(self, memory, view):
        return self.inner.next_batch(memory, view)
"""


def test_a_policy_of_a_users_own_file_reaches_the_ranks(tmp_path, alone):
    path = tmp_path / "mine.py"
    path.write_text(OWN_POLICY)
    found = serve_parallel(run_of(1, 2, batching=load_file(path).Mine()))
    assert found.served.answers == alone[0].answers
    assert found.link is None

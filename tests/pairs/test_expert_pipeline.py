"""Attention and expert ranks: one process's tokens and logits, and every decision replayed."""

from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from backends.emulated_link import EmulatedLink
from backends.expert_serving import TINY, ExpertRun, layout_of, serve_experts
from backends.kv_cache import Corruption
from backends.reference import KeepLogits, Reference
from backends.sampling import Sampler, Sampling
from backends.serving import open_model, serve, use_one_thread
from backends.weights import shipped_config
from scenarios.validation import decisions, experts
from scenarios.validation.options import with_short_chunks
from scenarios.validation.verdict import Verdict
from sim.dispatch_log import first_turn, noted
from sim.engine import ReplicaLimits
from sim.policies.registry import load_file, policies
from sim.state.expert_dispatch import dispatch
from sim.trace import State
from sim.workload.recorded import Recorded
from sim.workload.source import Source
from sim.workload.token_routing.base import Tokens
from sim.workload.token_routing.choices_file import write_choices

pytestmark = pytest.mark.slow
ALL_CHOSEN = shipped_config(TINY) | {"num_experts_per_tok": 8}
ONE_CHOSEN = shipped_config(TINY) | {"num_experts_per_tok": 1}
SKEWED = [[64.0, 32, 16, 8, 4, 2, 1, 1], [1.0, 1, 2, 4, 8, 16, 32, 64]]
FEW = Recorded(arrival_s=[0.0] * 12, prompt_tokens=list(range(5, 53, 4)), output_tokens=[14] * 12)
FEW_LIMITS = ReplicaLimits(8, 64, 16, 12)


def rule(family, name, **options):
    return policies(family)[name](**options)


def batching(name):
    return with_short_chunks(rule("batching", name))


def run_of(num_attention, num_expert_ranks, **changed):
    fields = {
        "workload": decisions.workload(24), "limits": decisions.LIMITS,
        "batching": batching("continuous"), "num_attention": num_attention,
        "num_expert_ranks": num_expert_ranks,
    }  # fmt: skip
    return ExpertRun(**(fields | changed))


def few(num_attention, num_expert_ranks, **changed):
    """A run of a few requests whose KV does not fit at once."""
    small = {"workload": FEW, "limits": FEW_LIMITS, "batching": batching("chunked_prefill")}
    return run_of(num_attention, num_expert_ranks, **(small | changed))


COMBINATIONS = {
    "2x2 continuous": run_of(2, 2),
    "1x2 chunked_prefill, whole batches": run_of(
        1, 2, batching=batching("chunked_prefill"), micro_batching=rule("micro_batching", "none"),
    ),
    "2x2 replicas of hot experts": run_of(
        2, 2, batching=batching("chunked_prefill"), num_micro_batches=2, slots_per_node=5,
        expert_balance=rule("expert_balance", "replicate_hot"), loads=SKEWED,
    ),
    "2x1 least_loaded, one expert chosen": run_of(
        2, 1, num_micro_batches=4, routing=rule("routing", "least_loaded"), config=ONE_CHOSEN,
    ),
    "1x2 static, every expert chosen": run_of(
        1, 2, workload=decisions.workload(20), batching=batching("static"), config=ALL_CHOSEN,
    ),
}  # fmt: skip


def test_every_rule_and_several_numbers_of_micro_batches_are_tried():
    runs = COMBINATIONS.values()
    for family, field in (
        ("batching", "batching"),
        ("micro_batching", "micro_batching"),
        ("expert_balance", "expert_balance"),
    ):
        assert {type(getattr(run, field)) for run in runs} == set(policies(family).values())
    assert {run.count for run in runs} == {1, 2, 3, 4}


@cache
def alone(num_requests, chosen):
    """Answers and logits of a single process, with so many experts a token."""
    use_one_thread()
    kept = KeepLogits()
    config = shipped_config(TINY) | {"num_experts_per_tok": chosen}
    model = open_model("random", "cpu", config=config)[1]
    source = Source(decisions.workload(num_requests), 0, decisions.CONTEXT)
    served = serve(model, source, batching("continuous"), decisions.LIMITS, sampler=kept)
    return served.answers, kept.logits


def logits_of(served):
    """Logits of every token that any attention rank drew."""
    return {place: row for kept in served.samplers for place, row in kept.logits.items()}


def furthest(found, reference):
    assert set(found) == set(reference)
    return max(float(np.abs(found[place] - row).max()) for place, row in reference.items())


@pytest.fixture(scope="module", params=COMBINATIONS)
def panels(request):
    run = replace(COMBINATIONS[request.param], sampler=KeepLogits(), keeps_spans=True)
    return request.param, run, experts.run_both(run)


def test_decisions_dispatch_lists_and_bytes_equal_the_simulated_ones(panels):
    name, run, both = panels
    lines = experts.judge(name, run, both)
    for line in lines:
        assert line.verdict is Verdict.passed, line
        assert line.simulated == line.measured != "0"
    pairs = 2 * run.num_attention * run.num_expert_ranks
    assert len(lines) == 3 + 3 + pairs, "every rank must send to every one of the other kind"
    nodes = both.real.trace.routes["replica"]
    assert set(nodes.tolist()) == set(range(run.num_attention))


def test_answers_and_logits_are_those_of_a_single_process(panels):
    _, run, both = panels
    chosen = experts.architecture_of(run).experts_per_token
    answers, logits = alone(run.workload.num_requests, chosen)
    assert both.real.answers == answers
    assert (both.real.trace.events["state"] == State.preempted).any(), "a pool must run out"
    assert furthest(logits_of(both.real), logits) < 1e-4


def test_every_rank_works_once_a_layer_and_micro_batch(panels):
    """Experts hear of empty micro-batches too; whole iterations without rows there are none."""
    _, run, both = panels
    layers = experts.architecture_of(run).num_layers
    iterations = len({one.instant_s for one in both.real.log})
    for rank in range(run.num_expert_ranks):
        spans = [one for one in both.real.spans if one[0] == f"experts {rank}"]
        places = [(f"layer {layer}", at) for layer in range(layers) for at in range(run.count)]
        assert [(one[1], one[4]) for one in spans] == places * iterations
    for rank in range(run.num_attention):
        spans = [one for one in both.real.spans if one[0] == f"attention {rank}"]
        sent = {(one.instant_s, one.layer, one.micro_batch)
                for one in both.real.log if one.source == rank}  # fmt: skip
        for operation in ("layer", "combine"):
            assert sum(one[1].startswith(operation) for one in spans) == len(sent)
    assert all(begin_s < end_s for _, _, begin_s, end_s, _ in both.real.spans)


def altered_logs(run, real):
    """The real log with a fault that each name says, in its first list of two rows or more."""
    placement = layout_of(run, experts.architecture_of(run)).placement
    (layer, tokens, ids), first = real.routed[0], real.log[0]
    turn = first_turn(first.source, first.micro_batch)
    sent = dispatch(ids, placement.physical_to_logical[layer], placement.slots_per_node, turn)
    place, begin = first[:4], int(sent.node_rows[: first.target].sum())
    honest = noted(place, tokens, sent)
    assert honest == real.log[: len(honest)]
    order = sent.order.copy()
    assert first.rows > 1
    order[[begin, begin + 1]] = order[[begin + 1, begin]]
    rest = real.log[len(honest) :]
    return {
        "two rows change places": noted(place, tokens, sent._replace(order=order)) + rest,
        "another token": noted(place, tokens._replace(positions=tokens.positions + 1), sent) + rest,
        "the last list is not sent": real.log[:-1],
        "two lists change places": [*real.log[1::-1], *real.log[2:]],
        "another instant": [first._replace(instant_s=first.instant_s + 1e-6), *real.log[1:]],
    }


def test_a_dispatch_that_departs_from_the_simulated_one_is_caught(panels):
    name, run, both = panels
    for fault, log in altered_logs(run, both.real).items():
        line = experts.dispatch_line(name, both._replace(real=both.real._replace(log=log)))
        assert line.verdict is Verdict.missed, fault
        assert line.error >= 1


def test_a_row_that_goes_elsewhere_is_a_miss_of_bytes(panels):
    name, run, both = panels
    row_bytes = experts.architecture_of(run).hidden_size * decisions.FLOAT32_BYTES
    first, *rest = both.real.sent
    lost = first._replace(payload_bytes=first.payload_bytes - row_bytes)
    altered = both._replace(real=both.real._replace(sent=[lost, *rest]))
    wrong = [
        (line.verdict, line.error)
        for line in experts.pair_lines(name, altered, run, row_bytes)
        if line.verdict is not Verdict.passed
    ]
    assert wrong == [(Verdict.missed, row_bytes)]


@pytest.mark.parametrize(
    ("corruption", "missed"),
    [
        (Corruption(kind="skip_free", index=3), "decisions of its replicas that differ"),
        (Corruption(kind="drop_copy", index=60), "KV bytes written by all replicas"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_corrupted_cache_of_an_attention_rank_is_caught(corruption, missed):
    run = run_of(2, 1, workload=decisions.workload(16), corruption=corruption)
    lines = experts.expert_lines("", run)
    assert any(missed in line.metric for line in lines if line.verdict is Verdict.missed), lines


def save_mixtral(folder, *, half_idle):
    """A Mixtral of random weights; `half_idle`: no token ever chooses the last four experts."""
    torch.manual_seed(0)
    shape = {
        name: value for name, value in shipped_config(TINY).items()
        if name not in ("architectures", "model_type", "torch_dtype")
    }  # fmt: skip
    config = transformers.MixtralConfig(**shape, initializer_range=0.1)
    model = transformers.MixtralForCausalLM(config).eval()
    gates = [one for name, one in model.named_parameters() if name.endswith("gate.weight")]
    assert [tuple(one.shape) for one in gates] == [(8, 64)] * 2
    if half_idle:
        with torch.no_grad():
            for gate in gates:  # one of each pair is above 0, where the others are
                gate[1], gate[3], gate[4:] = -gate[0], -gate[2], 0.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["all experts", "half of them"])
def from_a_folder(request, tmp_path_factory):
    """A run of a checkpoint folder, what both panels did, and the folder."""
    folder = save_mixtral(tmp_path_factory.mktemp("mixtral"), half_idle=request.param)
    stream = np.random.default_rng(3)
    asked = [stream.integers(512, size=length).tolist() for length in FEW.prompt_tokens]
    run = few(1, 2, weights=str(folder), prompts=asked, sampler=KeepLogits())
    return request.param, run, experts.run_both(run)


def test_logits_of_a_checkpoint_folder_are_those_of_transformers(from_a_folder):
    _, run, both = from_a_folder
    reference, found = Reference(run.weights, "cpu"), logits_of(both.real)
    expected = {}
    for request, prompt in enumerate(run.prompts):
        rows = reference.logits(prompt, both.real.answers[request])
        expected |= {(request, len(prompt) + step): row for step, row in enumerate(rows)}
    assert furthest(found, expected) < 1e-4
    assert np.std(list(expected.values())) > 0.1, "logits of nothing would be alike too"


def test_an_expert_rank_that_gets_no_token_is_sent_nothing_and_waits_for_nothing(from_a_folder):
    half_idle, run, both = from_a_folder
    for line in experts.judge("", run, both):
        assert line.verdict is Verdict.passed, line
    served = {0, 1} if half_idle else {0, 1, 2}
    assert {rank for pair in both.real.payload_bytes() for rank in pair} == served
    assert {one.target for one in both.real.log} == {rank - 1 for rank in served - {0}}


def test_an_attention_rank_without_requests_takes_part_and_idle_ranks_wait():
    """The second rank is sent nothing but the second request, long after the first has ended."""
    workload = Recorded(arrival_s=[0.0, 0.4], prompt_tokens=[9, 1], output_tokens=[5, 1])
    run = few(3, 1, workload=workload, batching=batching("continuous"))
    both = experts.run_both(run)
    for line in experts.judge("", run, both):
        assert line.verdict is Verdict.passed, line
    assert both.real.trace.routes["replica"].tolist() == [0, 1]
    assert set(both.real.payload_bytes()) == {(0, 3), (3, 0), (1, 3), (3, 1)}
    assert list(map(len, (both.real.answers[0], both.real.answers[1]))) == [5, 1]


def test_reused_prompts_cannot_be_compared_and_are_refused():
    run = few(1, 1, limits=FEW_LIMITS._replace(prefix_caching=True))
    with pytest.raises(ValueError, match="prefix_caching=True must be False here"):
        experts.run_both(run)


@cache
def few_alone(sampler):
    model = open_model("random", "cpu", config=shipped_config(TINY))[1]
    return serve(
        model, Source(FEW, 0, decisions.CONTEXT), batching("chunked_prefill"), FEW_LIMITS,
        sampler=sampler,
    ).answers  # fmt: skip


def test_draws_over_a_slow_link_are_those_of_a_single_process():
    sampler = Sampler(Sampling(temperature=0.8, top_p=0.95, seed=7))
    link = EmulatedLink(latency_s=5e-4, bandwidth_bytes_per_s=1e9)
    found = serve_experts(few(1, 1, sampler=sampler, link=link))
    assert found.answers == few_alone(sampler) != few_alone(None)
    assert found.link == "emulated"
    assert found.log == found.routed == found.spans == []


OWN_POLICY = """
from dataclasses import dataclass

from sim.policies.micro_batching.base import MicroBatching


@dataclass(kw_only=True)
class Alternating(MicroBatching):
    def count(self, planned):
        return 2

    def split(self, rows, count):
        return [list(range(at, len(rows), count)) for at in range(count)]
"""


def test_a_micro_batching_rule_of_a_users_own_file_reaches_the_ranks(tmp_path):
    path = tmp_path / "alternating.py"
    path.write_text(OWN_POLICY)
    run = few(1, 1, micro_batching=load_file(path).Alternating(), keeps_log=True)
    found = serve_experts(run)
    assert found.answers == few_alone(None)
    assert found.link is None
    assert {one.micro_batch for one in found.log} == {0, 1}


def test_a_recorded_routing_to_experts_that_are_not_there_is_refused(tmp_path):
    """A single process is the real panel of one attention rank, as far as decisions go."""
    run, path = few(1, 1), tmp_path / "routing.parquet"
    experts.record_routing(run, path)
    model = open_model("random", "cpu", config=shipped_config(TINY))[1]
    real = serve(model, Source(FEW, 0, decisions.CONTEXT), run.batching, run.limits).trace
    _, log = experts.simulate_again(run, real, path)
    assert log
    table = pq.read_table(path).to_pydict()
    ids = np.array(table["expert_ids"])
    for wrong in (8, -1):
        ids[5, 1] = wrong
        tokens = Tokens(np.array(table["request"]), np.array(table["position"]))
        write_choices(path, tokens, np.array(table["layer"]), ids)
        with pytest.raises(ValueError, match=rf"row 6: expert_ids=.*{wrong}.* from 0 to 7"):
            experts.simulate_again(run, real, path)

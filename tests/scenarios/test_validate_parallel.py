"""`diptych validate` of a replica on several ranks."""

import json

import pytest

from hardware_models.parts import read_node
from scenarios.cli import main

pytestmark = pytest.mark.slow
QUICK = ["weights=random", "decision_requests=12", "prompts=3", "new_tokens=3"]


def validate(tmp_path, *arguments):
    out = tmp_path / "validation"
    code = main(["validate", "-cn", "parallel", f"out={out}", *QUICK, *arguments])
    return code, json.loads((out / "validation.json").read_text())["lines"]


@pytest.mark.parametrize(
    ("sizes", "carried"),
    [
        (["tp_size=2"], {"embedding", "attention output", "mlp output", "logits"}),
        (["tp_size=1", "pp_size=2"], {"hidden states", "tokens"}),
    ],
)
def test_decisions_bytes_and_numbers_pass(tmp_path, sizes, carried):
    questions = "only=[decisions,bytes,numbers]"
    code, lines = validate(tmp_path, questions, *sizes, "policy/batching=chunked_prefill")
    assert code == 0
    by_question = {line["question"]: [] for line in lines}
    for line in lines:
        by_question[line["question"]].append(line)
    # Of two stages two batches are in flight, and requests are routed to them.
    asked = 2 if "pp_size=2" in sizes else 1
    assert [line["verdict"] for line in by_question["decisions"]] == ["passed"] * asked
    assert [line["verdict"] for line in by_question["numbers"]] == ["passed"] * 2
    assert [line["verdict"] for line in by_question["time"]] == ["not_run"]
    sent = {
        line["metric"].removeprefix("chunked_prefill: ").removesuffix(" sent"): line
        for line in by_question["bytes"]
        if line["metric"].endswith("sent")
    }
    assert set(sent) == carried | {"orders"}
    assert sent.pop("orders")["verdict"] == "reported"
    assert {line["verdict"] for line in sent.values()} == {"passed"}


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2)])
def test_time_is_asked_of_the_ranks_own_iterations(tmp_path, monkeypatch, tp_size, pp_size):
    monkeypatch.setenv("HOME", str(tmp_path))
    sizes = ["time_requests=3", "repeats=1", "policy/batching=continuous"]
    sizes += [f"tp_size={tp_size}", f"pp_size={pp_size}"]
    # On a busy machine a line may miss: that is a finding about the machine, not about the code.
    code, lines = validate(tmp_path, "only=[time]", *sizes)
    timed = [line for line in lines if line["question"] == "time"]
    assert code == any(line["verdict"] == "missed" for line in timed)
    assert "continuous: TTFT, median error of a request" in {line["metric"] for line in timed}
    told = {line["metric"] for line in timed}
    assert ("stages that compute at once take longer by" in told) == (pp_size > 1)
    assert (tmp_path / "validation" / "timeline.png").exists()
    node = read_node(tmp_path / ".config" / "diptych" / "node" / "this_machine.yaml")
    assert set(node.calibration.models) == {f"tiny_llama_tp{tp_size}_pp{pp_size}"}


def test_routing_rules_of_lanes_and_one_batch_can_be_asked_for(tmp_path):
    asked = ["only=[decisions]", "tp_size=1", "pp_size=2", "policy/batching=continuous"]
    code, lines = validate(tmp_path, *asked, "policy/routing=round_robin,least_loaded")
    told = [line["metric"] for line in lines if line["question"] == "decisions"]
    assert code == 0
    assert len(told) == 4
    assert told[2] == "continuous, least_loaded: routing decisions that differ"
    code, lines = validate(tmp_path / "one", *asked, "engine.batches_in_flight=1")
    told = [line["metric"] for line in lines if line["question"] == "decisions"]
    assert (code, told) == (0, ["continuous: decisions that differ"])


def test_ranks_that_do_not_divide_the_tiny_model_get_one_that_they_do(tmp_path):
    asked = ["only=[decisions,bytes]", "tp_size=3", "policy/batching=chunked_prefill"]
    code, lines = validate(tmp_path, *asked, "decision_requests=8")
    assert code == 0
    exact = [line["verdict"] for line in lines if line["question"] in ("decisions", "bytes")]
    assert exact.count("passed") == 1 + 3 + 4


def test_a_seeded_corruption_makes_it_fail(tmp_path):
    code, lines = validate(
        tmp_path, "only=[decisions,bytes]", "corrupt=skip_free", "policy/batching=continuous",
        "decision_requests=16",
    )  # fmt: skip
    assert code == 1
    assert "missed" in {line["verdict"] for line in lines}


def test_weights_that_do_not_divide_are_replaced_and_it_says_so(tmp_path):
    code, lines = validate(
        tmp_path, "only=[numbers]", "weights=smollm2", "policy/batching=continuous"
    )
    assert code == 0
    note = next(line["note"] for line in lines if line["question"] == "numbers")
    assert "of random weights, as tp_size=2 must divide num_heads=9" in note


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("tp_size=0", "tp_size=0 must be at least 1"),
        ("pp_size=two", "pp_size"),
        ("device=cuda", "need a GPU each"),
    ],
)
def test_impossible_ranks_are_refused_and_nothing_is_written(tmp_path, capsys, argument, message):
    import torch

    if argument == "device=cuda" and torch.cuda.device_count() > 1:
        pytest.skip("this machine has what the test wants to miss")
    out = tmp_path / "validation"
    assert main(["validate", "-cn", "parallel", f"out={out}", *QUICK, argument]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()

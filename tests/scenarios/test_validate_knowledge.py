"""`diptych validate` of a study that retrieves documents, on the tiny model."""

import json

from scenarios.validation.knowledge_time import UNCACHED, variants_of
from sim.knowledge_rules import Rules
from sim.policies.registry import policies


def validate(diptych, workplace, *arguments):
    code, said, errors = diptych(
        "validate", "-cn", "ragcache", f"out={workplace / 'found'}", "weights=random", *arguments
    )
    return code, json.loads((workplace / "found" / "validation.json").read_text()), said + errors


def test_time_is_asked_of_each_way_to_keep_documents(diptych, workplace):
    _, content, said = validate(
        diptych, workplace, "only=[time]", "time_requests=10", "repeats=2",
        "policy/cache_eviction=lru,gdsf,pgdsf",
    )  # fmt: skip
    lines = {line["metric"]: line for line in content["lines"] if line["question"] == "time"}
    means = [f"{name}: mean TTFT" for name in (UNCACHED, "lru", "pgdsf")]
    ratios = [f"mean TTFT, {name} / pgdsf" for name in (UNCACHED, "lru")]
    assert [name for name in lines if "mean TTFT" in name] == [*means, *ratios]
    for name in means:
        assert lines[name]["accepted"] == 0.15
        assert lines[name]["low"] <= lines[name]["error"] <= lines[name]["high"]
    assert {lines[name]["accepted"] for name in ratios} == {0.10}
    # The tiny model is so fast that its times say little: what is asked is that they are compared.
    assert "GB/s" in lines["a copy between the tiers"]["measured"]
    assert {path.name for path in (workplace / "found").iterdir()} >= {
        "validation.json", "timeline.png",
    }  # fmt: skip
    assert "timeline.png" in said


def test_what_is_lost_and_who_leaves_is_asked_beside_every_rule(diptych, workplace):
    code, content, _ = validate(
        diptych, workplace, "only=[decisions,bytes]", "decision_requests=40",
        "policy/cache_eviction=lru",
    )  # fmt: skip
    assert code == 0
    exact = [line for line in content["lines"] if line["question"] in ("decisions", "bytes")]
    assert {line["verdict"] for line in exact} == {"passed"}
    assert {line["metric"].partition(":")[0] for line in exact} == {
        "lru", "GPU tier lost, clients leave",
    }  # fmt: skip
    answers = [line for line in exact if "answers" in line["metric"]]
    assert "2 losses" in answers[0]["note"]


def test_an_accepted_error_of_another_kind_of_study_is_refused(diptych, workplace):
    code, _, errors = diptych(
        "validate", "-cn", "ragcache", "+accept.ttft_median_error=0.1", f"out={workplace / 'x'}"
    )
    assert code == 2
    assert "accept names ['ttft_median_error'], which nothing judges" in errors
    assert "ttft_mean_error" in errors


def test_a_fault_that_it_cannot_have_is_refused(diptych, workplace):
    code, _, errors = diptych(
        "validate", "-cn", "ragcache", "corrupt=stale_block", "engine.prefix_caching=true",
        f"out={workplace / 'x'}",
    )  # fmt: skip
    assert code == 2
    assert "corrupt=stale_block is a fault of prefix caching, and study ragcache" in errors
    assert "take corrupt=skip_free or drop_copy" in errors


def test_the_last_rule_is_the_one_that_others_are_compared_with():
    rules = policies("cache_eviction")
    base = Rules(None, rules["lru"](), None, None)
    for asked, timed in ((["pgdsf", "lfu", "lru"], ["lru", "pgdsf"]), (["lfu"], ["lfu"])):
        found = variants_of(base, {name: rules[name]() for name in asked})
        assert list(found) == [UNCACHED, *timed]
        assert [type(one.rules.cache_eviction) for one in found.values()][1:] == [
            rules[name] for name in timed
        ]
        assert [one.reuse for one in found.values()] == [False, *[True] * len(timed)]

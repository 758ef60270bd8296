"""`diptych search` finds what trying everything finds, the same on every launcher."""

import csv
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenarios.search_space import Interval, Space, in_hydras_words
from scenarios.study import Search
from scenarios.trials import Trials, judge

SMALL = ("-cn", "cheapest", "workload.num_requests=60", "seeds=[0]")
SPACE = ("gpu=a10g,l40s,h100_sxm,rtx_4090", "policy/batching=static,continuous",
         "engine.max_num_batched_tokens=2048")  # fmt: skip


def table(folder):
    return list(csv.DictReader((Path(folder) / "sweep.csv").read_text().splitlines()))


def test_the_best_is_the_one_that_trying_everything_finds(diptych):
    assert diptych("run", "-m", *SMALL, *SPACE, "out=all")[0] == 0
    tried = [row for row in table("all") if float(row["slo_share"]) >= 0.9 and
             float(row["overloaded"]) == 0 and row["usd_per_hour"]]  # fmt: skip
    least = min(float(row["usd_per_hour"]) for row in tried)
    code, out, _ = diptych("search", *SMALL, *SPACE, "search.met_share=0.9", "out=found")
    assert code == 0
    found = json.loads(Path("found/search.json").read_text())
    assert found["best"]["value"] == least
    assert found["num_feasible"] == len(tried)
    assert found["best"]["choices"] in [
        {key: row[key] for key in found["best"]["choices"]} for row in tried
    ]
    assert "8 configurations tried (all that there are)" in out
    assert f"best: gpu={found['best']['choices']['gpu']} " in out
    rows = table("found")
    assert len(rows) == 8
    unpriced = [row for row in rows if not row["usd_per_hour"]]
    why = {row["policy/batching"]: row["infeasible"] for row in unpriced}
    assert why["continuous"] == "usd_per_hour is not known for it"
    assert sum(not row["infeasible"] for row in rows) == len(tried)


def test_a_search_tries_the_same_on_every_launcher_and_resumes_with_nothing_to_do(diptych):
    search = ("search", *SMALL, "engine.max_num_batched_tokens=int(interval(256,8192))",
              "policy/batching=continuous,chunked_prefill", "search.num_trials=8")  # fmt: skip
    code, _, errors = diptych(*search, "out=one")
    assert (code, errors.count("done: ")) == (0, 8)
    assert diptych(*search, "out=two", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")[0] == 0
    for name in ("sweep.csv", "sweep.parquet", "search.json"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    before = Path("one/search.json").read_bytes()
    assert diptych(*search, "out=one", "resume=true")[2].count("done: ") == 0
    assert Path("one/search.json").read_bytes() == before
    diptych(*search, "search.seed=1", "out=three")
    assert Path("three/search.json").read_bytes() != before


def test_what_is_refused_or_outside_is_a_row_with_its_reason(diptych):
    code, out, _ = diptych("search", *SMALL, "model=llama_3_8b,llama_3_70b", "gpu=l40s",
                           "policy/batching=continuous", "engine.max_num_batched_tokens=2048",
                           "slo.ttft_s=0.001", "out=o")  # fmt: skip
    assert code == 1
    small, large = sorted(table("o"), key=lambda row: row["model"], reverse=True)
    assert "% of the requests met the SLO" in small["infeasible"]
    assert "llama_3_70b in bf16 does not fit" in large["infeasible"]
    assert large["infeasible"] == large["error"]
    assert "0 within the SLO, 1 not, 1 refused" in out
    assert "none is feasible; the nearest:" in out
    assert "model=llama_3_8b" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-cn", "replica"), "study replica has nothing to search"),
        (("-cn", "cheapest", "search.minimise=usd_per_our"), "did you mean 'usd_per_hour'?"),
        (("-cn", "cheapest", "slo.ttft_s=null", "slo.tpot_s=null"), "the study demands nothing"),
        (("-cn", "cheapest", "search.met_share=1.2"), "search.met_share=1.2 must be above 0"),
        (("-cn", "cheapest", "search.num_trials=0"), "search.num_trials=0 must be at least 1"),
        (("-cn", "cheapest", "gpu=l40s,l4s"), "gpu=l4s is not known"),
        (("-cn", "cheapest", "workload.rate_per_s=interval(5,1)"), "must begin below its end"),
        (("-cn", "cheapest", "slo.ttft_s=tag(log,interval(0,1))"), "must begin above 0"),
        (("-cn", "cheapest", "-m"), "-m has no meaning for `diptych search`"),
        (("-cn", "cheapest", "search.within=budget"), "within"),
    ],
)
def test_a_search_that_cannot_be_is_refused_and_leaves_nothing(diptych, arguments, expected):
    code, _, errors = diptych("search", *arguments)
    assert code == 2
    assert expected in errors
    assert os.listdir() == []


@given(st.integers(0, 2**16), st.sampled_from([0.0, 7.0, 100.0]))
def test_trials_are_those_of_the_seed_whatever_order_their_rows_come_in(seed, target):
    space = Space({"a": Interval("a", 0.0, 10.0, whole=False, log=False), "b": ["b=1", "b=2"]})
    search = Search(space={"a": "x"}, num_trials=14, seed=seed, met_share=0.5)

    def run(reverse):
        def run_batch(points):
            order = list(reversed(points)) if reverse else points
            return {point: row(point) for point in order}

        def row(point):
            value = abs(float(point[0].partition("=")[2]) - target)
            figures = {"usd_per_hour": value, "slo_share": 1.0 if value < 8 else 0.0}
            return {"error": "", "figures": {**figures, "overloaded": 0.0}}

        trials = Trials(search)
        trials.run(space, run_batch)
        return trials

    one, other = run(reverse=False), run(reverse=True)
    assert set(one.judged) == set(other.judged)
    assert one.best() == other.best()
    assert len(one.judged) == 14
    feasible = [j.value for j in one.judged.values() if not j.infeasible]
    best = one.best()
    assert (best is None) == (not feasible)
    assert best is None or one.judged[best].value == min(feasible)


def test_a_space_of_yaml_may_be_lists_or_hydras_words():
    assert in_hydras_words({"gpu": ["l40s", "h20"], "tp_size": "range(1,4)", "x": 3}) == {
        "gpu": "choice(l40s,h20)", "tp_size": "range(1,4)", "x": "3",
    }  # fmt: skip


def test_the_further_outside_the_worse():
    search = Search(space={"x": [1]}, met_share=0.9)

    def lack(error="", overloaded=0.0, slo_share=1.0):
        figures = {"overloaded": overloaded, "slo_share": slo_share, "usd_per_hour": 1.0}
        return judge({"error": error, "figures": {} if error else figures}, search).violation

    ordered = [lack(), lack(slo_share=0.8), lack(slo_share=0.2)]
    ordered += [lack(overloaded=1.0, slo_share=0.2), lack(error="no")]
    assert ordered == sorted(ordered)
    assert ordered[0] <= 0 < ordered[1]

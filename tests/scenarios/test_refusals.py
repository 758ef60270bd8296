"""Bad input: refused with its value, the rule and the way out, and nothing is left behind."""

import os

import pytest

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:17:03.9799600,10,5\n"

REFUSED = {
    "unknown_key": (
        ["workload.rate=3"],
        ["workload.rate is not a field of Poisson", "did you mean 'rate_per_s'", "it has"],
    ),
    "unknown_top_level_key": (["nod=3"], ["nod is not a field of Study", "did you mean 'node'"]),
    "wrong_type": (["engine.block_size=many"], ["engine.block_size", "'many'", "Integer"]),
    "unknown_policy": (
        ["policy/batching=contnuous"],
        ["policy/batching=contnuous is not", "did you mean 'continuous'", "chunked_prefill"],
    ),
    "unknown_token_routing": (
        ["token_routing=skwed"],
        ["token_routing=skwed is not", "did you mean 'skewed'", "balanced"],
    ),
    "key_of_another_token_routing": (
        ["token_routing.skew=1"], ["token_routing.skew is not a field of Uniform"],
    ),
    "negative_skew": (
        ["token_routing=skewed", "token_routing.skew=-1"], ["skew=-1.0", "not negative", "try"],
    ),
    "token_routing_without_its_file": (
        ["token_routing=recorded"], ["token_routing.path", "needs one", "=VALUE"],
    ),
    "unknown_balance": (
        ["policy/expert_balance=replicate_cold"],
        ["policy/expert_balance=replicate_cold is not", "'replicate_hot'", "static"],
    ),
    "unknown_enum": (["model.dtype=bf15"], ["bf15", "bf16"]),
    "unknown_model": (["model=llama_9"], ["llama_9", "llama_3_8b"]),
    "negative_rate": (["workload.rate_per_s=-3"], ["rate_per_s=-3.0", "positive", "try"]),
    "missing_value": (["workload=gamma"], ["workload.", "needs one", "=VALUE"]),
    "does_not_fit": (["model=llama_3_70b"], ["llama_3_70b", "a100_80g has", "larger GPU"]),
    "prompt_over_context": (
        ["workload.lengths=fixed", "workload.length_cv=null", "workload.max_tokens=null",
         "workload.input_tokens=9000"],
        ["9000", "at most", "shorten"],
    ),
    "node_and_gpu": (["gpu=h20"], ["node=a100_80g_x1 and gpu=h20", "exactly one", "node=null"]),
    "no_machine": (["node=null"], ["neither node nor gpu", "diptych list"]),
    "smuggled_in_a_part": (["+node.num_gpu=4"], ["node.num_gpu", "num_gpus", "leave it out"]),
    "smuggled_in_a_policy": (
        ["+policy.batching.chunk=4"], ["policy.batching.chunk", "watermark", "leave it out"],
    ),
    "smuggled_at_the_top": (["+seed=4"], ["seed is not a field", "seeds"]),
    "bad_seeds": (["seeds=[1,1]"], ["seeds=[1, 1]", "distinct", "try"]),
    "foreign_folder": (["out=."], ["out=.", "the folder that you are in", "name one below"]),
    "unknown_group": (["policy/batchin=static"], ["policy/batchin is not a group", "diptych list"]),
    "unreadable_override": (["workload.rate_per_s=[1"], ["workload.rate_per_s=[1", "quote"]),
    "sweep_without_m": (["workload.rate_per_s=1,2"], ["workload.rate_per_s"]),
}  # fmt: skip


def tree():
    return sorted(os.path.join(*found) for found in _walk())


def _walk():
    for folder, folders, files in os.walk("."):
        yield from ((folder, name) for name in (*folders, *files))


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(diptych, workplace, case):
    overrides, expected = REFUSED[case]
    (workplace / "something").write_text("mine")
    code, out, errors = diptych("run", "-cn", "replica", *overrides)
    assert code == 2
    assert out == ""
    assert errors.startswith("error: ")
    assert "Traceback" not in errors
    assert [part for part in expected if part not in errors] == []
    assert tree() == ["./something"]


@pytest.mark.parametrize(
    "command",
    [
        ("run", "-cn", "replica", "workload.num_requests=5"),
        ("run", "-m", "-cn", "replica", "workload.num_requests=5"),
        ("validate", "-cn", "replica", "only=[decisions]", "decision_requests=5"),
    ],
    ids=lambda command: "-".join(command[:2]),
)
@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("mine", "mine is not empty and holds"),
        ("file", "file is a file"),
        ("file/below", "Not a directory"),
        ("/proc/nowhere", "No such file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_folder_of_somebody_else_s_or_of_nobody_s_is_left_alone(
    diptych, workplace, command, out, reason
):
    (workplace / "file").write_text("mine")
    for name in ("summary.json", "validation.json", "rows/0123456789.json", "rows/thesis.tex"):
        path = workplace / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    before = tree()
    code, printed, errors = diptych(*command, f"out={out}")
    assert (code, printed) == (2, "")
    assert reason in errors
    assert "name another" in errors
    assert tree() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEADER + GOOD + "2023-11-16 18:17:04.0,ten,5\n", ["load.csv:3", "'ten'", "correct"]),
        (HEADER + "yesterday,10,5\n", ["load.csv:2", "yesterday", "must read like"]),
        (HEADER + "2023-11-16 18:17:04.0,10\n", ["load.csv:2", "2 fields"]),
        (HEADER, ["load.csv:1", "no request follows"]),
        ("", ["load.csv:1", "no lines"]),
    ],
)
def test_a_bad_trace_line_is_named_by_file_and_line(diptych, workplace, text, expected):
    (workplace / "load.csv").write_text(text)
    code, _, errors = diptych(
        "run", "-cn", "replica", "workload=azure_trace", "workload.path=load.csv"
    )
    assert code == 2
    assert [part for part in expected if part not in errors] == []
    assert tree() == ["./load.csv"]


def test_an_empty_workload_is_refused(diptych):
    arguments = ("workload.num_requests=null", "workload.duration_s=0.0001")
    code, _, errors = diptych("run", "-cn", "replica", *arguments)
    assert code == 2
    assert "0 requests" in errors
    assert tree() == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu"], ["'rnu' is not known", "did you mean 'run'", "compare"]),
        (["run", "-cn", "replika"], ["'replika' is not known", "did you mean 'replica'"]),
        (["run", "-cn"], ["-cn needs a value"]),
        (["run", "-cn", "replica", "--config-dir", "nowhere"], ["nowhere", "must be a folder"]),
        (["validate", "-cn", "replica", "-m"], ["-m has no meaning for `diptych validate`"]),
        (["list", "--bogus"], ["--bogus has no meaning for `diptych list`"]),
        (["validate", "-cn", "replica", "only=[]"], ["only=[] asks nothing"]),
        (["validate", "-cn", "replica", "prompts=65"], ["prompts=65 must be at most 64"]),
        (["validate", "-cn", "replica", "weights=none"], ["'none' is neither a folder"]),
        (["list", "gup"], ["'gup' is not known", "did you mean 'gpu'"]),
        (["report"], ["report needs a folder"]),
        (["report", "nowhere"], ["nowhere", "summary.json", "diptych run"]),
        (["compare", "nowhere"], ["two results", "got 1"]),
    ],
)
def test_a_bad_command_says_what_to_do(diptych, arguments, expected):
    code, out, errors = diptych(*arguments)
    assert (code, out) == (2, "")
    assert [part for part in expected if part not in errors] == []


def test_a_folder_of_the_path_variable_must_exist(diptych, monkeypatch):
    monkeypatch.setenv("DIPTYCH_PATH", "nowhere")
    code, _, errors = diptych("run", "-cn", "replica")
    assert code == 2
    assert "DIPTYCH_PATH=nowhere must be a folder" in errors


def test_a_broken_part_of_ones_own_is_named_with_its_line(diptych, tmp_path):
    (tmp_path / "scaling").mkdir()
    (tmp_path / "scaling" / "broken.yaml").write_text("prefill: [\n")
    code, out, errors = diptych(
        "run", "--config-dir", str(tmp_path), "-cn", "loongserve", "scaling=broken"
    )
    assert (code, out) == (2, "")
    assert "broken.yaml" in errors
    assert "line 2" in errors
    assert "mend the file" in errors

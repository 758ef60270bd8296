"""Replay of published traces: equal to an independent reading, and every broken line is named."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sim.workload.azure_trace import AzureTrace
from sim.workload.base import RequestColumns
from sim.workload.burstgpt_trace import BurstgptTrace
from sim.workload.lengths_trace import LengthsTrace
from sim.workload.mooncake_trace import MooncakeTrace
from sim.workload.source import Source, check
from sim.workload.trace_replay import TraceReplay

TRACES = Path(__file__).parents[4] / "shared" / "data" / "traces"
ANY = 10**9

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:59.9799600,4808,10\n"
    "2023-11-16 18:18:00.0319601,3180,8\n"
    "2023-11-16 18:18:00.0319601,110,27\n"
)
MOONCAKE = "".join(
    json.dumps({"timestamp": t, "input_length": n, "output_length": 5, "hash_ids": ids}) + "\n"
    for t, n, ids in ((0, 1100, [1, 2, 3]), (1500, 600, [1, 9]), (3000, 40, []))
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "3,ChatGPT,7,0,7,Conversation log\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,GPT-4,1087,230,1317,API log\n"
    "46,GPT-4,0,0,0,API log\n"
)
LENGTHS = "num_prefill_tokens,num_decode_tokens,num_total_tokens\n3772,54,3826\n2015,156,2171\n"


def _real(name: str) -> Path:
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path


def _write(folder: Path, text: str | bytes, name: str = "trace.csv") -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def _one(workload: TraceReplay, seed: int = 1) -> RequestColumns:
    chunks = list(workload.columns(seed))
    assert len(chunks) == 1
    return chunks[0]


@pytest.mark.parametrize("name", ["code", "conv"])
def test_azure_equals_an_independent_reading(name: str) -> None:
    path = _real(f"AzureLLMInferenceTrace_{name}.csv")
    table = pd.read_csv(path, parse_dates=["TIMESTAMP"])
    columns = _one(AzureTrace(path=str(path)))
    np.testing.assert_array_equal(columns.prompt_tokens, table["ContextTokens"])
    np.testing.assert_array_equal(columns.output_tokens, table["GeneratedTokens"])
    since = table["TIMESTAMP"] - table["TIMESTAMP"][0]
    nanoseconds = since.to_numpy().astype("timedelta64[ns]").astype(np.int64)
    np.testing.assert_array_equal(columns.arrival_s, nanoseconds / 1e9)


def test_mooncake_equals_an_independent_reading() -> None:
    path = _real("mooncake_conversation_trace.jsonl")
    table = pd.read_json(path, lines=True, dtype=False)
    totals = check(MooncakeTrace(path=str(path)), 0, ANY)
    assert totals.num_requests == len(table)
    assert totals.prompt_tokens == table["input_length"].sum()
    assert totals.output_tokens == table["output_length"].sum()
    assert totals.last_arrival_s == table["timestamp"].iloc[-1] / 1000
    hashes = _one(MooncakeTrace(path=str(path))).prefix_hashes
    assert hashes is not None
    assert sum(map(len, hashes)) == table["hash_ids"].map(len).sum()


def test_lengths_equal_an_independent_reading_and_arrive_at_the_rate() -> None:
    path = _real("vidur_arxiv_summarization_lengths.csv")
    table = pd.read_csv(path)
    totals = check(LengthsTrace(path=str(path), rate_per_s=4.0), 0, ANY)
    assert totals.num_requests == len(table)
    assert totals.prompt_tokens == table["num_prefill_tokens"].sum()
    assert totals.output_tokens == table["num_decode_tokens"].sum()
    mean_s = totals.last_arrival_s / (len(table) - 1)
    assert mean_s * 4.0 == pytest.approx(1.0, abs=4 / len(table) ** 0.5)


def test_seven_digits_of_a_second_survive(tmp_path: Path) -> None:
    columns = _one(AzureTrace(path=_write(tmp_path, AZURE)))
    assert columns.arrival_s.tolist() == [0.0, 0.0520001, 0.0520001]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (AzureTrace, AZURE),
        (MooncakeTrace, MOONCAKE),
        (BurstgptTrace, BURSTGPT),
    ],
)
def test_scale_divides_every_gap_exactly(
    kind: type[TraceReplay], text: str, tmp_path: Path
) -> None:
    path = _write(tmp_path, text)
    normal, twice = (_one(kind(path=path, scale=scale)).arrival_s for scale in (1.0, 2.0))
    np.testing.assert_array_equal(np.diff(twice) * 2, np.diff(normal))
    np.testing.assert_array_equal(twice * 2, normal)
    assert normal[0] == 0.0


def test_failed_requests_are_passed_over_and_counted(tmp_path: Path) -> None:
    workload = BurstgptTrace(path=_write(tmp_path, BURSTGPT))
    assert check(workload, 0, ANY)[:5] == (2, 1559, 248, 2, 40.0)
    assert sum(c.num_skipped for c in workload.columns(0, 1)) == 2
    assert check(BurstgptTrace(path=workload.path, limit=1), 0, ANY)[:5] == (1, 472, 18, 1, 0.0)


def test_limit_stops_reading_before_what_follows(tmp_path: Path) -> None:
    path = _write(tmp_path, AZURE + "broken\n")
    assert len(_one(AzureTrace(path=path, limit=3))) == 3


def test_lengths_are_cut_only_when_asked(tmp_path: Path) -> None:
    path = _write(tmp_path, MOONCAKE)
    assert _one(MooncakeTrace(path=path)).prompt_tokens.tolist() == [1100, 600, 40]
    cut = MooncakeTrace(path=path, max_input_tokens=600, max_output_tokens=3)
    requests = list(Source(cut, 0, 4096).initial())
    assert [r.prompt_tokens for r in requests] == [600, 600, 40]
    assert [r.output_tokens for r in requests] == [3, 3, 3]
    # 600 tokens hold one whole block of 512: the cut request shares no more than that.
    assert [r.prefix_hashes for r in requests] == [(1,), (1, 9), ()]


@pytest.mark.parametrize("chunk_rows", [1, 2, 3])
def test_chunk_size_changes_no_row_of_a_trace(chunk_rows: int, tmp_path: Path) -> None:
    for kind, text in ((AzureTrace, AZURE), (BurstgptTrace, BURSTGPT)):
        workload = kind(path=_write(tmp_path, text))
        parts = [chunk.arrival_s for chunk in workload.columns(0, chunk_rows)]
        np.testing.assert_array_equal(np.concatenate(parts), _one(workload).arrival_s)


def test_bom_crlf_gzip_and_final_blank_lines_change_nothing(tmp_path: Path) -> None:
    plain = _one(AzureTrace(path=_write(tmp_path, AZURE))).arrival_s
    windows = b"\xef\xbb\xbf" + AZURE.replace("\n", "\r\n").encode() + b"\r\n\r\n"
    for text, name in (
        (windows, "a.csv"),
        (gzip.compress(windows), "a.csv.gz"),
        (AZURE.rstrip(), "b"),
    ):
        path = _write(tmp_path, text, name)
        np.testing.assert_array_equal(_one(AzureTrace(path=path)).arrival_s, plain)


def test_a_record_is_made_without_opening_its_file() -> None:
    assert AzureTrace(path="nowhere.csv").path == "nowhere.csv"


def test_lengths_do_not_depend_on_the_rate(tmp_path: Path) -> None:
    path = _write(tmp_path, LENGTHS)
    slow, fast = (_one(LengthsTrace(path=path, rate_per_s=rate)) for rate in (1.0, 2.0))
    np.testing.assert_array_equal(slow.prompt_tokens, fast.prompt_tokens)
    np.testing.assert_allclose(slow.arrival_s, fast.arrival_s * 2)
    with pytest.raises(ValueError, match="rate_per_s=0 must be positive"):
        LengthsTrace(path=path, rate_per_s=0)


@pytest.mark.parametrize(
    "changed", [{"scale": 0.0}, {"limit": 0}, {"max_input_tokens": 0}, {"max_output_tokens": 0}]
)
def test_replay_parameters_out_of_range_are_refused(changed: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changed))}=0"):
        AzureTrace(path="x.csv", **changed)

"""Whatever is wrong with a trace is named by file, line, value, rule and way out."""

import gzip
import json
from pathlib import Path

import pytest

from sim.workload.azure_trace import AzureTrace
from sim.workload.burstgpt_trace import BurstgptTrace
from sim.workload.mooncake_trace import MooncakeTrace
from sim.workload.trace_replay import TraceReplay

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
GOOD = "2023-11-16 18:17:03.9799600,4808,10"
AZURE = f"{HEADER}\n{GOOD}\n{GOOD}\n{GOOD}\n"
JSON_GOOD = json.dumps(
    {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]}
)
BURST_HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"


def _write(folder: Path, text: str | bytes, name: str = "trace.csv") -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "lines", "message"),
    [
        (AzureTrace, [HEADER, GOOD, GOOD[:20]], r":3: .* has 1 fields and the header 3; complete"),
        (AzureTrace, [HEADER, GOOD, "2023-11-16,5,5"], r":3: arrival='2023-11-16' must read like"),
        (AzureTrace, [HEADER, "2023-13-16 18:17:03,5,5"], r":2: arrival='2023-13-16"),
        (AzureTrace, [HEADER, GOOD, "2023-11-16 18:17:03.9,5,5"], r":3: .* not go backwards; sort"),
        (AzureTrace, [HEADER, GOOD.replace(",10", ",0")], r":2: output_tokens='0' must be a whole"),
        (AzureTrace, [HEADER, GOOD.replace(",4808", ",-1")], r":2: prompt_tokens='-1' must be"),
        (AzureTrace, [HEADER, GOOD.replace(",4808", ",4_8")], r":2: prompt_tokens='4_8' must be"),
        (AzureTrace, [HEADER, GOOD.replace(",10", ",1e3")], r":2: output_tokens='1e3' must be"),
        (AzureTrace, [HEADER, GOOD, "", GOOD], r":3: the line is blank; remove it"),
        (AzureTrace, [HEADER], r":1: no request follows"),
        (AzureTrace, ["TIMESTAMP,Tokens,GeneratedTokens", GOOD], r":1: .* lacks prompt_tokens"),
        (AzureTrace, [HEADER + ",input_length", GOOD + ",4"], r":1: .* has prompt_tokens 2 times"),
        (
            AzureTrace,
            ["TIMESTAMP," + HEADER, "2023-11-16 18:17:03," + GOOD],
            r":1: .* has arrival 2 times, as \['TIMESTAMP', 'TIMESTAMP'\] and must have it once",
        ),
        (AzureTrace, [HEADER, '"' + GOOD], r":2: .* is not CSV"),
        (MooncakeTrace, [JSON_GOOD, '{"a":' * 200_000], r":2: .* is nested too deeply .* remove"),
        (MooncakeTrace, ["[" * 200_000], r":1: .* is nested too deeply"),
        (MooncakeTrace, [JSON_GOOD, JSON_GOOD[:60]], r":2: .* does not end a JSON object"),
        (MooncakeTrace, [JSON_GOOD, "[1, 2]"], r":2: .* must be a JSON object"),
        (MooncakeTrace, [JSON_GOOD.replace("hash", "hush")], r":1: .* lacks prefix_hashes"),
        (MooncakeTrace, [JSON_GOOD.replace("[1, 2, 3]", "[1, null]")], r":1: prefix_hashes="),
        (MooncakeTrace, [JSON_GOOD.replace(": 5", ": true")], r":1: output_tokens=True must be"),
        (MooncakeTrace, [JSON_GOOD.replace(": 0", ": NaN")], r":1: arrival=nan must be"),
        (MooncakeTrace, [JSON_GOOD.replace(": 0", ': "0"')], r":1: arrival='0' must be"),
        (BurstgptTrace, [BURST_HEADER, "x,M,1,1,2,API log"], r":2: arrival='x' must be"),
        (BurstgptTrace, [BURST_HEADER, "1,M,0,1,2,API log"], r":2: prompt_tokens='0' must be"),
        (BurstgptTrace, [BURST_HEADER, "1,M,4,0,4,API log"], r":1: no request follows"),
        (BurstgptTrace, [BURST_HEADER, "inf,M,4,1,4,API log"], r":2: arrival='inf' must be"),
    ],
)
def test_a_broken_line_is_named(
    kind: type[TraceReplay], lines: list[str], message: str, tmp_path: Path
) -> None:
    path = _write(tmp_path, "\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"trace\.csv" + message):
        list(kind(path=path).columns(0))


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(AZURE.encode())
    for text, name, message in (
        (b"", "empty.csv", r"empty\.csv:1: the file has no lines"),
        (b"\xef\xbb\xbf\n\n", "blank.csv", r"blank\.csv:1: the file has no lines"),
        (AZURE.encode() + b"\xff\xfe,1,1\n", "latin.csv", r"latin\.csv:5: .* is not UTF-8"),
        (whole[:-12], "cut.csv.gz", r"cut\.csv\.gz:\d: the compressed data must be whole"),
        (AZURE.encode(), "plain.csv.gz", r"plain\.csv\.gz:1: the compressed data"),
    ):
        with pytest.raises(ValueError, match=message):
            list(AzureTrace(path=_write(tmp_path, text, name)).columns(0))
    for path in (str(tmp_path / "absent.csv"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"path=.* must be a readable file .* correct"):
            list(AzureTrace(path=path).columns(0))

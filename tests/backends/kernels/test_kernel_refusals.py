"""What does not fit is refused with the value, the rule, the way out; missing triton is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import offsets, paged_case, random_query

from backends.kernels.paged import KvCache
from backends.kernels.paged_decode_attention import paged_decode_attention
from backends.kernels.paged_prefill_attention import paged_prefill_attention
from backends.kernels.rms_norm import rms_norm
from backends.kernels.rotary_kv_write import Rotation, rotary_kv_write, rotary_tables


def decode(**changes):
    case = paged_case([4, 20])
    arguments = {
        "query": random_query(case, 2, 9),
        "cache": case.cache,
        "block_tables": case.block_tables,
        "context_lengths": case.context_lengths,
        "scale": case.scale,
    }
    return paged_decode_attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 64)}, r"query.shape=\[2, 64\] must be \[\*, \*, \*\]"),
        ({"query": torch.zeros(2, 8, 64)}, r"num_kv_heads=3 must divide num_heads=8; check"),
        ({"query": torch.zeros(2, 9, 32)}, r"cache.key.shape=.* must be \[\*, \*, \*, 32\]"),
        ({"query": torch.zeros(3, 9, 64)}, r"3 rows.* use paged_prefill_attention"),
        ({"query": torch.zeros(2, 9, 64).half()}, r"cache.key.dtype=torch.float32 must equal"),
        ({"query": torch.zeros(2, 9, 64).long()}, r"query.dtype=torch.int64 must be one of"),
        ({"query": torch.zeros(2, 64, 9).mT}, r"query.stride.* pass query.contiguous"),
        ({"block_tables": torch.zeros(2, 3).long()}, r"must be torch.int32; use .to\("),
        ({"block_tables": torch.zeros(3, 3).int()}, r"block_tables.shape=\[3, 3\] must be \[2"),
        ({"context_lengths": torch.ones(2)}, r"context_lengths.dtype=torch.float32 must be"),
        (
            {"cache": KvCache(*torch.zeros(2, 4, 3, 16, 64).transpose(2, 3))},
            r"cache.key.stride.* must be contiguous",
        ),
    ],
)
def test_decode_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        decode(**changes)


def test_prefill_refuses_a_chunk_longer_than_its_context():
    case = paged_case([4, 20])
    arguments = (case.cache, case.block_tables, case.context_lengths)
    with pytest.raises(ValueError, match=r"sequence 0: chunk of 5 tokens.*context_length=4"):
        paged_prefill_attention(random_query(case, 6, 9), *arguments, offsets([5, 1]), case.scale)
    with pytest.raises(ValueError, match=r"query_starts.shape=\[2\] must be \[3\]"):
        paged_prefill_attention(random_query(case, 6, 9), *arguments, offsets([6]), case.scale)


def test_norm_refuses_what_does_not_fit():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight.shape=\[7\] must be \[8\]"):
        rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match=r"residual.dtype=torch.float16 must equal x.dtype"):
        rms_norm(x, torch.ones(8), 1e-5, x.half())


@pytest.mark.parametrize(
    ("head_dim", "slots", "message"),
    [
        (5, torch.zeros(2).long(), "head_dim=5 must be even"),
        (4, torch.zeros(2).int(), "slot_mapping.dtype=torch.int32 must be torch.int64"),
        (4, torch.zeros(3).long(), r"slot_mapping.shape=\[3\] must be \[2\]"),
    ],
)
def test_rotary_refuses(head_dim, slots, message):
    rows = torch.zeros(2, 1, head_dim)
    cache = KvCache(*torch.zeros(2, 2, 2, 1, head_dim))
    rotation = Rotation(*rotary_tables(torch.ones(head_dim // 2), 4), torch.zeros(2).long())
    with pytest.raises(ValueError, match=message):
        rotary_kv_write(rows, rows, rows, rotation, cache, slots)


def test_operators_run_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from backends.kernels import paged_decode_attention, paged_prefill_attention\n"
        "from backends.kernels import rms_norm, rotary_kv_write\n"
        "print(rms_norm.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist())\n"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert finished.stdout == "[[1.0, 1.0, 1.0, 1.0]]\n", finished.stderr

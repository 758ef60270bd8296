"""What does not fit is refused with the value, the rule, the way out; missing triton is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import offsets, paged_case, random_query

from backends.kernels.expert_combine import expert_combine
from backends.kernels.expert_ffn import expert_ffn
from backends.kernels.expert_gate import Routed, expert_gate, scatter_rows
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 1, 8)}, r"hidden.shape=\[2, 1, 8\] must be \[\*, \*\]"),
        ({"hidden": torch.zeros(2, 8).long()}, r"hidden.dtype=torch.int64 must be one of"),
        ({"hidden": torch.zeros(8, 2).T}, r"hidden.stride.* pass hidden.contiguous"),
        ({"gate_weight": torch.zeros(4, 7)}, r"gate_weight.shape=\[4, 7\] must be \[\*, 8\]"),
        ({"gate_weight": torch.zeros(4, 8).half()}, r"gate_weight.dtype=.* must equal hidden"),
        ({"gate_weight": torch.zeros(8, 4).T}, r"pass gate_weight.contiguous"),
        ({"gate_weight": torch.zeros(0, 8)}, r"has 0 experts and must have 1 to 512"),
        ({"gate_weight": torch.zeros(513, 8)}, r"has 513 experts .*; split the experts"),
        ({"top_k": 0}, r"top_k=0 must be between 1 and experts=4; check"),
        ({"top_k": 5}, r"top_k=5 must be between 1 and experts=4; check"),
    ],
)
def test_gate_refuses(changes, message):
    arguments = {"hidden": torch.zeros(2, 8), "gate_weight": torch.zeros(4, 8), "top_k": 2}
    with pytest.raises(ValueError, match=message):
        expert_gate(**(arguments | changes))


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.zeros(3, 2).int(), r"routed.slots.shape=\[3, 2\] must be \[2, \*\]"),
        (torch.zeros(2, 2).long(), r"routed.slots.dtype=torch.int64 must be torch.int32"),
        (torch.zeros(2, 2).int().T, r"pass routed.slots.contiguous"),
    ],
)
def test_scatter_refuses(slots, message):
    routed = Routed(slots, slots.float(), torch.zeros(4).int(), slots)
    with pytest.raises(ValueError, match=message):
        scatter_rows(torch.zeros(2, 8), routed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.zeros(3)}, r"rows.shape=\[3\] must be \[\*, \*\]: n, hidden"),
        ({"rows": torch.zeros(3, 8).bfloat16()}, r"gate_up.dtype=.* must equal rows.dtype"),
        ({"counts": torch.tensor([3, 0])}, r"counts.dtype=torch.int64 must be torch.int32"),
        ({"counts": torch.zeros(0).int()}, r"0 experts and must have 1 to 1024"),
        ({"counts": torch.tensor([3, 1]).int()}, r"counts sum to 4 and must sum to the 3 rows"),
        ({"counts": torch.tensor([4, -1]).int()}, r"counts=\[4, -1\] must not be negative"),
        ({"gate_up": torch.zeros(3, 10, 8)}, r"gate_up.shape=\[3, 10, 8\] must be \[2, \*, 8\]"),
        ({"gate_up": torch.zeros(2, 9, 8)}, r"gate_up.shape=\[2, 9, 8\] must have an even"),
        ({"down": torch.zeros(2, 8, 4)}, r"down.shape=\[2, 8, 4\] must be \[2, 8, 5\]"),
        ({"down": torch.zeros(2, 5, 8).mT}, r"pass down.contiguous"),
    ],
)
def test_ffn_refuses(changes, message):
    arguments = {
        "rows": torch.zeros(3, 8),
        "counts": torch.tensor([1, 2]).int(),
        "gate_up": torch.zeros(2, 10, 8),
        "down": torch.zeros(2, 8, 5),
    }
    with pytest.raises(ValueError, match=message):
        expert_ffn(**(arguments | changes))


@pytest.mark.parametrize(
    ("slots", "weights", "message"),
    [
        (torch.zeros(2).int(), torch.zeros(2), r"slots.shape=\[2\] must be \[\*, \*\]"),
        (torch.zeros(2, 2).int(), torch.zeros(2, 3), r"weights.shape=\[2, 3\] must be \[2, 2\]"),
        (torch.zeros(2, 2).long(), torch.zeros(2, 2), r"slots.dtype=.* must be torch.int32"),
        (
            torch.zeros(2, 2).int(),
            torch.zeros(2, 2).half(),
            r"weights.dtype=.* must be torch.float32",
        ),
        (torch.zeros(2, 2).int(), torch.zeros(2, 2).T, r"pass weights.contiguous"),
    ],
)
def test_combine_refuses(slots, weights, message):
    with pytest.raises(ValueError, match=message):
        expert_combine(torch.zeros(4, 8), slots, weights)


def test_operators_run_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from backends.kernels import paged_decode_attention, paged_prefill_attention\n"
        "from backends.kernels import expert_combine, expert_ffn, expert_gate\n"
        "from backends.kernels import rms_norm, rotary_kv_write\n"
        "print(rms_norm.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist())\n"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert finished.stdout == "[[1.0, 1.0, 1.0, 1.0]]\n", finished.stderr

"""Operators over KV on several instances refuse what does not fit, and run without triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import offsets

from backends.kernels.merge_parts import merge_parts
from backends.kernels.part_decode_attention import part_decode_attention, split_tokens
from backends.kernels.striped_prefill_attention import (
    RingState,
    Stripe,
    new_state,
    striped_prefill_attention,
)

POOL = torch.zeros(9, 2, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 8)}, r"query.shape=\[2, 8\] must be \[\*, \*, \*\]"),
        ({"query": torch.zeros(2, 4, 8).long()}, r"query.dtype=torch.int64 must be one of"),
        ({"query": torch.zeros(2, 8, 4).mT}, r"query.stride.* pass query.contiguous"),
        ({"query": torch.zeros(2, 3, 8)}, r"num_kv_heads=2 must divide num_heads=3; check"),
        ({"query": torch.zeros(2, 4, 8).half()}, r"key.dtype=torch.float32 must equal query"),
        ({"key": torch.zeros(9, 2, 7)}, r"key.shape=\[9, 2, 7\] must be \[\*, \*, 8\]"),
        ({"value": torch.zeros(8, 2, 8)}, r"value.shape=\[8, 2, 8\] must be \[9, 2, 8\]"),
        ({"value": torch.zeros(9, 3, 8)[:, :2]}, r"value.stride.* one tensor a layer"),
        ({"slots": torch.zeros(3)}, r"slots.dtype=torch.float32 must be torch.int64"),
        ({"slots": torch.zeros(3, 1).long()}, r"slots.shape=\[3, 1\] must be \[\*\]"),
        ({"slots": torch.zeros(6).long()[::2]}, r"pass slots.contiguous"),
        ({"starts": torch.zeros(3).long()}, r"starts.dtype=torch.int64 must be torch.int32"),
        ({"starts": offsets([3])}, r"starts.shape=\[2\] must be \[3\]"),
        ({"starts": offsets([3, 1])}, r"starts=\[0, 3, 4\] must rise from 0 to the 3 rows"),
        ({"starts": torch.tensor([0, 4, 3]).int()}, r"starts=.*; make it from the cumulative"),
    ],
)
def test_part_decode_refuses(changes, message):
    arguments = {
        "query": torch.zeros(2, 4, 8),
        "key": POOL,
        "value": POOL,
        "slots": torch.zeros(3).long(),
        "starts": offsets([2, 1]),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        part_decode_attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("outputs", "lses", "dtype", "message"),
    [
        ((2, 3, 8), (2, 3), torch.half, r"outputs.shape=\[2, 3, 8\] must be \[\*, \*, \*, \*\]"),
        ((2, 3, 4, 8), (2, 4, 3), torch.half, r"lses.shape=\[2, 4, 3\] must be \[2, 3, 4\]"),
        ((0, 3, 4, 8), (0, 3, 4), torch.half, r"outputs has 0 parts .* at least 1; stack"),
        ((2, 3, 4, 8), (2, 3, 4), torch.int32, r"dtype=torch.int32 must be one of"),
    ],
)
def test_merge_refuses(outputs, lses, dtype, message):
    with pytest.raises(ValueError, match=message):
        merge_parts(torch.zeros(outputs), torch.zeros(lses), dtype)


def test_merge_refuses_what_is_not_dense_float32():
    outputs, lses = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"outputs.dtype=torch.float16 must be torch.float32"):
        merge_parts(outputs.half(), lses)
    with pytest.raises(ValueError, match=r"lses.stride.* pass lses.contiguous"):
        merge_parts(outputs, torch.zeros(2, 4, 3).mT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(3, 5, 8)}, r"num_kv_heads=2 must divide num_heads=5; check"),
        ({"kv": (POOL, POOL[:8])}, r"value.shape=\[8, 2, 8\] must be \[9, 2, 8\]"),
        (
            {"queries": Stripe(torch.zeros(4).int(), offsets([1, 2]))},
            r"queries.positions.shape=\[4\] must be \[3\]: a position for each of the 3",
        ),
        (
            {"keys": Stripe(torch.zeros(9), offsets([1, 8]))},
            r"keys.positions.dtype=torch.float32 must be torch.int32",
        ),
        ({"keys": Stripe(torch.zeros(9).int(), offsets([9]))}, r"keys.starts.shape=\[2\] .* \[3\]"),
        (
            {"keys": Stripe(torch.zeros(18).int()[::2], offsets([1, 8]))},
            r"keys.positions.stride.* pass a contiguous copy",
        ),
        (
            {"keys": Stripe(torch.zeros(9).int(), offsets([1, 7]))},
            r"keys.starts=\[0, 1, 8\] must rise from 0 to the 9 rows",
        ),
        (
            {
                "queries": Stripe(torch.zeros(3).int(), torch.zeros(1).int()),
                "keys": Stripe(torch.zeros(9).int(), torch.zeros(1).int()),
            },
            r"queries.starts.shape=\[1\] must hold at least 2 offsets",
        ),
        (
            {"state": new_state(3, 2, 8, "cpu")},
            r"state.output.shape=\[3, 2, 8\] must be \[3, 4, 8\]",
        ),
        (
            {"state": RingState(torch.zeros(3, 4, 8), torch.zeros(3, 4).half())},
            r"state.lse.dtype=torch.float16 must be torch.float32",
        ),
    ],
)
def test_striped_prefill_refuses(changes, message):
    arguments = {
        "query": torch.zeros(3, 4, 8),
        "kv": (POOL, POOL),
        "queries": Stripe(torch.zeros(3).int(), offsets([1, 2])),
        "keys": Stripe(torch.zeros(9).int(), offsets([1, 8])),
        "scale": 1.0,
        "state": new_state(3, 4, 8, "cpu"),
    }
    with pytest.raises(ValueError, match=message):
        striped_prefill_attention(**(arguments | changes))


@pytest.mark.parametrize(("total", "num_kv_heads"), [(1, 1), (100_000, 8), (10**6, 32)])
def test_one_request_gives_every_processor_of_a_gpu_two_programs(monkeypatch, total, num_kv_heads):
    class Processors:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Processors)
    tokens = split_tokens(total, num_kv_heads, torch.device("cuda"))
    programs = -(-total // tokens) * num_kv_heads
    assert tokens >= 256
    assert tokens == 256 or 2 * 132 <= programs + num_kv_heads <= 2 * 132 + 2 * num_kv_heads


def test_distributed_operators_run_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from backends.kernels import part_decode_attention, striped_prefill_attention\n"
        "from backends.kernels.merge_parts import merge_parts\n"
        "print(merge_parts(torch.ones(2, 1, 1, 2), torch.zeros(2, 1, 1)).tolist())\n"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert finished.stdout == "[[[1.0, 1.0]]]\n", finished.stderr

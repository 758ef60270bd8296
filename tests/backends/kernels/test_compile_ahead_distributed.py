"""Every kernel over KV on several instances compiles for GPUs that this machine need not have."""

from __future__ import annotations

import ahead_of_time
import pytest
from ahead_of_time import (
    ELEMENT_BYTES,
    check_compiled_for_the_model_alone,
    check_compiles,
    name_of,
    source_of,
)

from backends.kernels.dispatch import IS_INTERPRETED
from backends.kernels.merge_parts import PART_TILE, merge_parts_kernel
from backends.kernels.paged import tile_sizes
from backends.kernels.part_decode_attention import merge_part_kernel, part_split_kernel
from backends.kernels.striped_prefill_attention import striped_prefill_kernel

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="interpreted kernels cannot be compiled")

POINTERS = {
    "merged_pointer": "*fp32",
    "merged_lse_pointer": "*fp32",
    "state_pointer": "*fp32",
    "query_positions_pointer": "*i32",
    "query_starts_pointer": "*i32",
    "key_positions_pointer": "*i32",
    "key_starts_pointer": "*i32",
}
ATTENTION = (part_split_kernel, striped_prefill_kernel)
MERGES = (merge_part_kernel, merge_parts_kernel)
ATTENTION_WARPS, MERGE_WARPS = 4, 2
"""What the launchers give them."""
SIZES = (("bf16", 128), ("fp32", 80))


@pytest.fixture(autouse=True)
def types_and_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead_of_time, "SPECIAL", ahead_of_time.SPECIAL | POINTERS)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def constants(head_dim, element):
    dim_tile, token_tile = tile_sizes(head_dim, ELEMENT_BYTES[element])
    return {
        "GROUP": 3,
        "GROUP_TILE": 16,
        "HEAD_DIM": head_dim,
        "DIM_TILE": dim_tile,
        "TOKEN_TILE": token_tile,
        "QUERY_TILE": 128 // ELEMENT_BYTES[element],
        "PARTS_TILE": PART_TILE,
    }


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("element", "head_dim"), SIZES)
@pytest.mark.parametrize("kernel", ATTENTION, ids=name_of)
def test_attention_over_parts_compiles(kernel, element, head_dim, capability):
    source = source_of(kernel, element, constants(head_dim, element))
    check_compiles(source, capability, ATTENTION_WARPS, num_stages=2)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", MERGES, ids=name_of)
def test_merge_compiles(kernel, capability):
    source = source_of(kernel, "bf16", constants(80, "bf16"))
    check_compiles(source, capability, MERGE_WARPS, num_stages=2)


@pytest.mark.parametrize("capability", [80, 90])
def test_slots_may_be_int64(monkeypatch, capability):
    monkeypatch.setitem(ahead_of_time.SPECIAL, "slots_pointer", "*i64")
    source = source_of(part_split_kernel, "bf16", constants(128, "bf16"))
    check_compiles(source, capability, ATTENTION_WARPS, num_stages=2)


@pytest.mark.parametrize("kernel", ATTENTION + MERGES, ids=name_of)
def test_kernel_over_parts_is_compiled_for_a_model_and_not_for_a_batch(kernel):
    check_compiled_for_the_model_alone(kernel, constants(64, "fp32"))

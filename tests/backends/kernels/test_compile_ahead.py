"""Every kernel of attention and around it compiles for GPUs that this machine need not have."""

from __future__ import annotations

import pytest
from ahead_of_time import (
    ELEMENT_BYTES,
    check_compiled_for_the_model_alone,
    check_compiles,
    name_of,
    source_of,
)

from backends.kernels import (
    online_softmax,
    paged_decode_attention,
    paged_prefill_attention,
    rms_norm,
    rotary_kv_write,
)
from backends.kernels.dispatch import IS_INTERPRETED
from backends.kernels.paged import tile_sizes

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="interpreted kernels cannot be compiled")


def constants(head_dim, element):
    dim_tile, token_tile = tile_sizes(head_dim, ELEMENT_BYTES[element])
    return {
        "HAS_RESIDUAL": True,
        "HIDDEN_TILE": 1024,
        "HALF": head_dim // 2,
        "HALF_TILE": dim_tile // 2,
        "HEAD_TILE": 4,
        "GROUP": 3,
        "GROUP_TILE": 16,
        "HEAD_DIM": head_dim,
        "DIM_TILE": dim_tile,
        "BLOCK_SIZE": 16,
        "TOKEN_TILE": token_tile,
        "QUERY_TILE": 128 // ELEMENT_BYTES[element],
        "SPLIT_TILE": 8,
    }


LAUNCHES = (
    (rms_norm.rms_norm_kernel, 4),
    (rms_norm.rms_norm_kernel, 8),
    (rotary_kv_write.rotary_kv_write_kernel, 2),
    (paged_decode_attention.decode_split_kernel, 4),
    (online_softmax.merge_splits_kernel, 2),
    (paged_prefill_attention.prefill_kernel, 4),
)
"""Every kernel with the `num_warps` that its launcher gives it."""
SIZES = (
    ("bf16", 64), ("bf16", 128), ("fp16", 80), ("fp32", 48), ("fp32", 64), ("fp32", 128),
)  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("element", "head_dim"), SIZES)
@pytest.mark.parametrize(("kernel", "num_warps"), LAUNCHES, ids=name_of)
def test_kernel_compiles(kernel, num_warps, element, head_dim, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = source_of(kernel, element, constants(head_dim, element))
    check_compiles(source, capability, num_warps, num_stages=2)


@pytest.mark.parametrize("kernel", sorted({kernel for kernel, _ in LAUNCHES}, key=name_of))
def test_what_changes_from_batch_to_batch_is_not_compiled_for(kernel):
    check_compiled_for_the_model_alone(kernel, constants(64, "fp32"))

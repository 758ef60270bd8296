"""Every kernel compiles for GPUs that this machine need not have."""

from __future__ import annotations

import pytest

from backends.kernels import (
    online_softmax,
    paged_decode_attention,
    paged_prefill_attention,
    rms_norm,
    rotary_kv_write,
)
from backends.kernels.dispatch import IS_INTERPRETED
from backends.kernels.paged import tile_sizes

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402 - after the skip
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="interpreted kernels cannot be compiled")

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Most shared memory that one program may have."""
SPECIAL = {
    "partial_pointer": "*fp32",
    "lse_pointer": "*fp32",
    "cos_pointer": "*fp32",
    "sin_pointer": "*fp32",
    "position_pointer": "*i64",
    "slot_pointer": "*i64",
    "table_pointer": "*i32",
    "length_pointer": "*i32",
    "starts_pointer": "*i32",
    "scale_log2": "fp32",
    "eps": "fp32",
}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


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


def source_of(kernel, element, head_dim):
    """Types by the naming rule: capitals are constants, *_pointer points, the rest are integers."""
    known = constants(head_dim, element)
    signature, divisible = {}, {}
    for index, name in enumerate(kernel.arg_names):
        plain = f"*{element}" if name.endswith("_pointer") else "i32"
        signature[name] = "constexpr" if name in known else SPECIAL.get(name, plain)
        if name.endswith("_pointer"):
            divisible[(index,)] = [["tt.divisibility", 16]]
    used = {name: known[name] for name in kernel.arg_names if name in known}
    return ASTSource(kernel, signature, used, divisible)


KERNELS = (
    rms_norm.rms_norm_kernel,
    rotary_kv_write.rotary_kv_write_kernel,
    paged_decode_attention.decode_split_kernel,
    online_softmax.merge_splits_kernel,
    paged_prefill_attention.prefill_kernel,
)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("element", "head_dim"), [("bf16", 128), ("fp16", 80), ("fp32", 48)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_kernel_compiles(kernel, element, head_dim, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": 4, "num_stages": 2}
    compiled = triton.compile(source_of(kernel, element, head_dim), target=target, options=options)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= SHARED_BYTES[capability]

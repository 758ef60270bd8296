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
OF_THE_MODEL = {
    "hidden", "num_heads", "num_kv_heads", "x_stride", "residual_stride", "query_stride",
    "key_stride", "value_stride",
}  # fmt: skip
"""Integers that stay as they are for a whole run, so that Triton may compile for their value."""


def name_of(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("element", "head_dim"), SIZES)
@pytest.mark.parametrize(("kernel", "num_warps"), LAUNCHES, ids=name_of)
def test_kernel_compiles(kernel, num_warps, element, head_dim, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": num_warps, "num_stages": 2}
    compiled = triton.compile(source_of(kernel, element, head_dim), target=target, options=options)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.num_warps == num_warps
    assert compiled.metadata.shared <= SHARED_BYTES[capability]


@pytest.mark.parametrize("kernel", sorted({kernel for kernel, _ in LAUNCHES}, key=name_of))
def test_what_changes_from_batch_to_batch_is_not_compiled_for(kernel):
    types = source_of(kernel, "fp32", 64).signature
    compiled_for = {
        parameter.name
        for parameter in kernel.params
        if types[parameter.name] == "i32" and not parameter.do_not_specialize
    }
    assert compiled_for <= OF_THE_MODEL

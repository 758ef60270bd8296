"""Compile a kernel for a GPU that this machine need not have."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402 - after the skip
from triton.compiler import ASTSource  # noqa: E402

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Most shared memory that one program may have."""
SPECIAL = {
    "partial_pointer": "*fp32",
    "lse_pointer": "*fp32",
    "cos_pointer": "*fp32",
    "sin_pointer": "*fp32",
    "weights_pointer": "*fp32",
    "position_pointer": "*i64",
    "slot_pointer": "*i64",
    "slots_pointer": "*i32",
    "expert_ids_pointer": "*i32",
    "counts_pointer": "*i32",
    "tile_counts_pointer": "*i32",
    "table_pointer": "*i32",
    "length_pointer": "*i32",
    "starts_pointer": "*i32",
    "scale_log2": "fp32",
    "eps": "fp32",
}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
OF_THE_MODEL = {
    "hidden", "num_heads", "num_kv_heads", "x_stride", "residual_stride", "query_stride",
    "key_stride", "value_stride", "experts", "inner", "hidden_stride", "gate_stride",
    "rows_stride", "slots_stride", "weights_stride", "gate_up_stride", "down_stride",
}  # fmt: skip
"""Integers that stay as they are for a whole run, so that Triton may compile for their value."""
ALIGNED = OF_THE_MODEL - {"num_heads", "num_kv_heads", "experts", "slots_stride", "weights_stride"}
"""Those that 16 divides in most models, for which loads are wide and pipelined: shared memory."""


def name_of(value):
    return getattr(value, "__name__", None)


def source_of(kernel, element, known):
    """Types by the naming rule: capitals are constants, *_pointer points, the rest are integers."""
    signature, divisible = {}, {}
    for index, name in enumerate(kernel.arg_names):
        plain = f"*{element}" if name.endswith("_pointer") else "i32"
        signature[name] = "constexpr" if name in known else SPECIAL.get(name, plain)
        if name.endswith("_pointer") or name in ALIGNED:
            divisible[(index,)] = [["tt.divisibility", 16]]
    used = {name: known[name] for name in kernel.arg_names if name in known}
    return ASTSource(kernel, signature, used, divisible)


def check_compiles(source, capability, num_warps, num_stages):
    """Compile for that capability within what one program may have."""
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=target, options=options)
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.num_warps == num_warps
    assert compiled.metadata.shared <= SHARED_BYTES[capability]


def check_compiled_for_the_model_alone(kernel, known):
    """No integer that changes from batch to batch makes Triton compile anew."""
    types = source_of(kernel, "fp32", known).signature
    compiled_for = {
        parameter.name
        for parameter in kernel.params
        if types[parameter.name] == "i32" and not parameter.do_not_specialize
    }
    assert compiled_for <= OF_THE_MODEL

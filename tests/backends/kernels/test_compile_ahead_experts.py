"""Every kernel of a mixture of experts compiles for GPUs that this machine need not have."""

from __future__ import annotations

import pytest
from ahead_of_time import (
    ELEMENT_BYTES,
    check_compiled_for_the_model_alone,
    check_compiles,
    name_of,
    source_of,
)

from backends.kernels.dispatch import IS_INTERPRETED
from backends.kernels.expert_combine import expert_combine_kernel
from backends.kernels.expert_ffn import ffn_tiles, ffn_warps, grouped_product_kernel, swiglu_kernel
from backends.kernels.expert_gate import (
    count_tile,
    expert_gate_kernel,
    gate_tiles,
    gate_warps,
    place_choices_kernel,
    scatter_rows_kernel,
)

pytestmark = pytest.mark.skipif(IS_INTERPRETED, reason="interpreted kernels cannot be compiled")

ELEMENTS = ("bf16", "fp32")
SIZES = ((1, 1, 1), (128, 8, 2), (9000, 128, 8), (64, 512, 10))
"""Tokens, experts, top_k: from one expert alone to as many as are allowed."""


def constants(tokens, experts, top_k, element):
    """Those of the gate, with the warps that go with them; those of the products likewise."""
    size = ELEMENT_BYTES[element]
    tiles = gate_tiles(tokens, experts, size)
    alone = tokens <= tiles["TOKEN_TILE"]
    gate = tiles | {"TOP_K": top_k, "RENORMALISE": True, "IS_ONLY_TILE": alone}
    gate |= {"COUNT_TILE": count_tile(tiles), "HIDDEN_TILE": 1024}
    products = ffn_tiles(tokens * top_k, experts, size)
    return gate, gate_warps(tiles), products, ffn_warps(products["ROW_TILE"])


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_gate_compiles(tokens, experts, top_k, element, capability):
    known, num_warps, _, _ = constants(tokens, experts, top_k, element)
    check_compiles(source_of(expert_gate_kernel, element, known), capability, num_warps, 3)
    check_compiles(source_of(place_choices_kernel, element, known), capability, 4, 3)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
def test_products_compile(tokens, experts, top_k, element, capability):
    _, _, known, num_warps = constants(tokens, experts, top_k, element)
    for kernel in (swiglu_kernel, grouped_product_kernel):
        check_compiles(source_of(kernel, element, known), capability, num_warps, 3)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("kernel", [scatter_rows_kernel, expert_combine_kernel], ids=name_of)
def test_copies_of_rows_compile(kernel, element, capability):
    known, *_ = constants(128, 8, 2, element)
    check_compiles(source_of(kernel, element, known), capability, 4, 3)


@pytest.mark.parametrize(
    "kernel", [expert_gate_kernel, place_choices_kernel, scatter_rows_kernel, expert_combine_kernel]
)
def test_gate_is_compiled_for_a_model_and_not_for_a_batch(kernel):
    check_compiled_for_the_model_alone(kernel, constants(128, 8, 2, "bf16")[0])


@pytest.mark.parametrize("kernel", [swiglu_kernel, grouped_product_kernel])
def test_products_are_compiled_for_a_model_and_not_for_a_batch(kernel):
    check_compiled_for_the_model_alone(kernel, constants(128, 8, 2, "bf16")[2])

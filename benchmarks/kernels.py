"""How fast is each kernel, and how much of it is memory traffic? `python benchmarks/kernels.py`.

On CUDA every kernel beside its torch reference; on CPU the references alone. Times are medians;
bytes are those that the operator must move once, so the rate compares with the memory's.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from backends.kernels.dispatch import IS_INTERPRETED, runs_triton, triton
from backends.kernels.expert_combine import expert_combine, expert_combine_reference
from backends.kernels.expert_ffn import expert_ffn, expert_ffn_reference
from backends.kernels.expert_gate import (
    expert_gate,
    expert_gate_reference,
    scatter_rows,
    scatter_rows_reference,
)
from backends.kernels.merge_parts import merge_parts, merge_parts_reference
from backends.kernels.paged import KvCache
from backends.kernels.paged_decode_attention import (
    paged_decode_attention,
    paged_decode_attention_reference,
)
from backends.kernels.paged_prefill_attention import (
    paged_prefill_attention,
    paged_prefill_attention_reference,
)
from backends.kernels.part_decode_attention import (
    part_decode_attention,
    part_decode_attention_reference,
)
from backends.kernels.rms_norm import rms_norm, rms_norm_reference
from backends.kernels.rotary_kv_write import (
    Rotation,
    rotary_kv_write,
    rotary_kv_write_reference,
    rotary_tables,
)
from backends.kernels.striped_prefill_attention import (
    Stripe,
    new_state,
    striped_prefill_attention,
    striped_prefill_attention_reference,
)

BLOCK_SIZE = 16
INSTANCES = 4
"""Over which the KV of a group lies."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer of a model under one load."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_sequences: int
    context: int
    chunk: int
    dtype: torch.dtype


SMALL = Shape(
    model="SmolLM2-135M",
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    num_sequences=8,
    context=512,
    chunk=128,
    dtype=torch.float32,
)
LARGE = Shape(
    model="Llama-3-8B",
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_sequences=32,
    context=4096,
    chunk=512,
    dtype=torch.bfloat16,
)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One layer of experts under one decode batch."""

    model: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    tokens: int
    dtype: torch.dtype


SMALL_MIXTURE = Mixture(
    model="a small mixture",
    hidden=576,
    inner=1024,
    experts=8,
    top_k=2,
    tokens=32,
    dtype=torch.float32,
)
LARGE_MIXTURE = Mixture(
    model="Mixtral-8x7B",
    hidden=4096,
    inner=14336,
    experts=8,
    top_k=2,
    tokens=256,
    dtype=torch.bfloat16,
)


@dataclass(frozen=True)
class Case:
    """One operator twice, and the bytes that it must move."""

    operator: str
    run: Callable[[], object]
    reference: Callable[[], object]
    moved_bytes: int


def size_bytes(*tensors: Tensor) -> int:
    """Payload of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def token_cases(shape: Shape, device: str) -> list[Case]:
    """Norm and rotary write of one prefill iteration, on num_sequences * chunk tokens."""
    tokens = shape.num_sequences * shape.chunk
    options = {"device": device, "dtype": shape.dtype}
    hidden = shape.num_heads * shape.head_dim
    x, residual = torch.randn(2, tokens, hidden, **options)
    weight = torch.randn(hidden, **options)
    query = torch.randn(tokens, shape.num_heads, shape.head_dim, **options)
    key, value = torch.randn(2, tokens, shape.num_kv_heads, shape.head_dim, **options)
    blocks = -(-tokens // BLOCK_SIZE)
    pool = torch.zeros(2, blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, **options)
    slots = torch.randperm(tokens, device=device)
    steps = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    rotation = Rotation(*rotary_tables(10_000.0**-steps, shape.context), slots % shape.context)
    norm_input = (x, weight, 1e-5, residual)
    write_input = (query, key, value, rotation, KvCache(*pool), slots)
    return [
        Case(
            "rms_norm with residual",
            lambda: rms_norm(*norm_input),
            lambda: rms_norm_reference(*norm_input),
            4 * size_bytes(x),
        ),
        Case(
            "rotary_kv_write",
            lambda: rotary_kv_write(*write_input),
            lambda: rotary_kv_write_reference(*write_input),
            2 * size_bytes(query) + 3 * size_bytes(key) + 2 * size_bytes(value),
        ),
    ]


def attention_cases(shape: Shape, device: str) -> list[Case]:
    """Decode of one token and prefill of the last chunk of each context."""
    options = {"device": device, "dtype": shape.dtype}
    max_blocks = -(-shape.context // BLOCK_SIZE)
    blocks = shape.num_sequences * max_blocks
    pool = torch.randn(2, blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, **options)
    tables = torch.randperm(blocks, device=device).int().view(shape.num_sequences, max_blocks)
    lengths = torch.full((shape.num_sequences,), shape.context, device=device).int()
    starts = torch.arange(shape.num_sequences + 1, device=device).int() * shape.chunk
    tokens = shape.num_sequences * shape.chunk
    query = torch.randn(tokens, shape.num_heads, shape.head_dim, **options)
    one, scale = query[: shape.num_sequences], shape.head_dim**-0.5
    paged = (KvCache(*pool), tables, lengths)
    return [
        Case(
            "paged_decode_attention",
            lambda: paged_decode_attention(one, *paged, scale),
            lambda: paged_decode_attention_reference(one, *paged, scale),
            size_bytes(pool, one, one),
        ),
        Case(
            "paged_prefill_attention",
            lambda: paged_prefill_attention(query, *paged, starts, scale),
            lambda: paged_prefill_attention_reference(query, *paged, starts, scale),
            size_bytes(pool, query, query),
        ),
    ]


def distributed_cases(shape: Shape, device: str) -> list[Case]:
    """Decode over one instance's part of each context, its merge, and one round of a ring."""
    options = {"device": device, "dtype": shape.dtype}
    n, part, scale = shape.num_sequences, shape.context // INSTANCES, shape.head_dim**-0.5
    kv = torch.randn(2, n * part, shape.num_kv_heads, shape.head_dim, **options)
    slots = torch.randperm(n * part, device=device)
    starts = torch.arange(n + 1, device=device).int() * part
    query = torch.randn(n * part, shape.num_heads, shape.head_dim, **options)
    decode_input = (query[:n], *kv, slots, starts, scale)
    attended, lse = part_decode_attention(*decode_input)
    merge_input = (torch.stack([attended] * INSTANCES), torch.stack([lse] * INSTANCES))
    own = Stripe((torch.arange(part, device=device).int() * INSTANCES).repeat(n), starts)
    state = new_state(n * part, shape.num_heads, shape.head_dim, device)
    round_input = (query, (kv[0], kv[1]), own, own, scale, state)
    return [
        Case(
            "part_decode_attention",
            lambda: part_decode_attention(*decode_input),
            lambda: part_decode_attention_reference(*decode_input),
            size_bytes(kv, query[:n], slots, attended, lse),
        ),
        Case(
            "merge_parts",
            lambda: merge_parts(*merge_input, shape.dtype),
            lambda: merge_parts_reference(*merge_input, shape.dtype),
            size_bytes(*merge_input, query[:n]),
        ),
        Case(
            "striped_prefill_attention",
            lambda: striped_prefill_attention(*round_input),
            lambda: striped_prefill_attention_reference(*round_input),
            size_bytes(kv, query, *state, *state),
        ),
    ]


def expert_cases(mixture: Mixture, device: str) -> list[Case]:
    """Gate, scatter, experts and combine of one layer, routed by chance, so nearly evenly."""
    options = {"device": device, "dtype": mixture.dtype}
    hidden = torch.randn(mixture.tokens, mixture.hidden, **options)
    gate_weight = torch.randn(mixture.experts, mixture.hidden, **options) * mixture.hidden**-0.5
    gate_up = torch.randn(mixture.experts, 2 * mixture.inner, mixture.hidden, **options)
    down = torch.randn(mixture.experts, mixture.hidden, mixture.inner, **options)
    gate_input = (hidden, gate_weight, mixture.top_k)
    routed = expert_gate(*gate_input)
    rows = scatter_rows(hidden, routed)
    ffn_input = (rows, routed.counts, gate_up, down)
    combine_input = (rows, routed.slots, routed.weights)
    idle_bytes = size_bytes(gate_up, down) * int((routed.counts == 0).sum()) // mixture.experts
    return [
        Case(
            "expert_gate",
            lambda: expert_gate(*gate_input),
            lambda: expert_gate_reference(*gate_input),
            size_bytes(hidden, gate_weight, *routed),
        ),
        Case(
            "scatter_rows",
            lambda: scatter_rows(hidden, routed),
            lambda: scatter_rows_reference(hidden, routed),
            size_bytes(hidden, routed.slots, rows),
        ),
        Case(
            "expert_ffn",
            lambda: expert_ffn(*ffn_input),
            lambda: expert_ffn_reference(*ffn_input),
            size_bytes(gate_up, down, rows, rows, routed.counts) - idle_bytes,
        ),
        Case(
            "expert_combine",
            lambda: expert_combine(*combine_input),
            lambda: expert_combine_reference(*combine_input),
            size_bytes(rows, hidden, routed.slots, routed.weights),
        ),
    ]


def median_s(run: Callable[[], object], device: str) -> float:
    """Median seconds of a call, warm."""
    if device == "cuda":
        return triton.testing.do_bench(run, quantiles=[0.5]) * 1e-3
    run()
    samples = []
    for _ in range(15):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def row_of(case: Case, device: str, with_kernel: bool) -> dict[str, object]:
    """Print one line of the table and return it in seconds and bytes."""
    reference_s = median_s(case.reference, device)
    kernel_s = median_s(case.run, device) if with_kernel else None
    kernel = "not run" if kernel_s is None else f"{kernel_s * 1e6:.1f}"
    rate = "" if kernel_s is None else f"{case.moved_bytes / kernel_s * 1e-9:.1f}"
    torch_rate = f"{case.moved_bytes / reference_s * 1e-9:.1f}"
    print(f"{case.operator:26}{kernel:>12}{rate:>10}{reference_s * 1e6:>16.1f}{torch_rate:>10}")
    return {
        "operator": case.operator,
        "kernel_s": kernel_s,
        "reference_s": reference_s,
        "moved_bytes": case.moved_bytes,
    }


def main() -> None:
    """Time every operator on the best device here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, mixture = (LARGE, LARGE_MIXTURE) if device == "cuda" else (SMALL, SMALL_MIXTURE)
    with_kernel = runs_triton(torch.empty(0, device=device)) and not IS_INTERPRETED
    torch.manual_seed(0)
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"{shape.model}, {shape.num_sequences} x {shape.context} tokens, {shape.dtype}, {name}")
    print(
        f"{mixture.model}, {mixture.tokens} tokens, {mixture.top_k} of {mixture.experts} experts, "
        f"{mixture.dtype}"
    )
    if not with_kernel:
        print("The Triton kernels were not run: no CUDA device here. Times are of the references.")
    print(f"{'operator':26}{'kernel us':>12}{'GB/s':>10}{'reference us':>16}{'GB/s':>10}")
    cases = token_cases(shape, device) + attention_cases(shape, device)
    cases += distributed_cases(shape, device) + expert_cases(mixture, device)
    rows = [row_of(case, device, with_kernel) for case in cases]
    settings = {
        what: {key: str(value) for key, value in asdict(sizes).items()}
        for what, sizes in (("shape", shape), ("mixture", mixture))
    }
    print(json.dumps({"device": device, "name": name, **settings, "rows": rows}))


if __name__ == "__main__":
    main()

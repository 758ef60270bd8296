"""The gate of a mixture of experts: which experts each token goes to, and the row it gets there.

hidden [tokens, hidden] and gate_weight [experts, hidden] -> `Routed`. Product, softmax, top-k,
weights, counts and scatter index are one fused operator, as in MegaScale-Infer (Zhu et al., 2025).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backends.kernels.checks import (
    check_float,
    check_index,
    check_like,
    check_packed,
    check_shape,
)
from backends.kernels.dispatch import constexpr, runs_triton, tl, triton
from backends.kernels.products import multiply_rows

MOST_EXPERTS = 512
"""The probabilities of a tile of tokens stay in registers, whole."""


class Routed(NamedTuple):
    """The choices of each token, and where they stand once all choices are sorted by expert."""

    expert_ids: Tensor
    """int32 [tokens, top_k], by decreasing probability, the lower id first among equals"""
    weights: Tensor
    """float32 [tokens, top_k], the probability of each choice among all experts; divided by their
    sum where renormalised"""
    counts: Tensor
    """int32 [experts], rows of each expert"""
    slots: Tensor
    """int32 [tokens, top_k], row of each choice when all are sorted by expert; within an expert
    by token"""


def expert_gate_reference(
    hidden: Tensor, gate_weight: Tensor, top_k: int, renormalise: bool = True
) -> Routed:
    """What `expert_gate` computes, in plain torch."""
    probabilities = (hidden.float() @ gate_weight.float().T).softmax(-1)
    ordered, experts = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, expert_ids = ordered[:, :top_k], experts[:, :top_k]
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    chosen = expert_ids.flatten()
    slots = torch.empty_like(chosen)
    slots[chosen.argsort(stable=True)] = torch.arange(len(chosen), device=chosen.device)
    return Routed(
        expert_ids=expert_ids.int().contiguous(),
        weights=weights.contiguous(),
        counts=chosen.bincount(minlength=gate_weight.shape[0]).int(),
        slots=slots.view(expert_ids.shape).int(),
    )


def scatter_rows_reference(hidden: Tensor, routed: Routed) -> Tensor:
    """What `scatter_rows` computes, in plain torch."""
    tokens, top_k = routed.slots.shape
    rows = torch.empty((tokens * top_k, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
    rows[routed.slots.flatten().long()] = hidden.repeat_interleave(top_k, dim=0)
    return rows


# tokens changes from batch to batch; Triton would compile anew for 1 and for multiples of 16.
@triton.jit(do_not_specialize=["tokens"])
def expert_gate_kernel(  # noqa: PLR0913, PLR0917
    hidden_pointer,
    gate_pointer,
    expert_ids_pointer,
    weights_pointer,
    tile_counts_pointer,
    slots_pointer,
    hidden_stride,
    gate_stride,
    tokens,
    hidden,
    experts,
    TOP_K: constexpr,
    RENORMALISE: constexpr,
    IS_ONLY_TILE: constexpr,
    TOKEN_TILE: constexpr,
    EXPERT_TILE: constexpr,
    DEPTH_TILE: constexpr,
):
    """One program a tile of tokens; slots count from the first of the tile unless it is alone."""
    tile, ids = tl.program_id(0), tl.arange(0, EXPERT_TILE)
    rows = tile * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
    inside, inside_expert = rows < tokens, ids < experts
    hidden_rows = hidden_pointer + rows.to(tl.int64) * hidden_stride
    gate_rows = gate_pointer + ids.to(tl.int64) * gate_stride
    logits = multiply_rows(hidden_rows, inside, gate_rows, inside_expert, hidden, DEPTH_TILE)
    logits = tl.where(inside_expert[None, :], logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    probabilities = powers / tl.sum(powers, 1)[:, None]
    # A token of NaN takes the first experts. Padding, the last ids at 0, loses every tie.
    ranks = tl.where(probabilities >= 0.0, probabilities, -1.0)
    choices = tl.full([TOKEN_TILE, EXPERT_TILE], TOP_K, tl.int32)
    for choice in range(TOP_K):
        is_best = ranks == tl.max(ranks, 1)[:, None]
        best = tl.min(tl.where(is_best, ids[None, :], EXPERT_TILE), 1)
        taken = ids[None, :] == best[:, None]
        choices = tl.where(taken, choice, choices)
        ranks = tl.where(taken, -2.0, ranks)
        tl.store(expert_ids_pointer + rows * TOP_K + choice, best, mask=inside)
    chosen = choices < TOP_K
    ones = (chosen & inside[:, None]).to(tl.int32)
    counts = tl.sum(ones, 0)
    tl.store(tile_counts_pointer + tile * experts + ids, counts, mask=inside_expert)
    places = tl.cumsum(ones, 0) - ones
    if IS_ONLY_TILE:
        places += (tl.cumsum(counts, 0) - counts)[None, :]
    if RENORMALISE:
        probabilities /= tl.sum(tl.where(chosen, probabilities, 0.0), 1)[:, None]
    for choice in range(TOP_K):
        weight = tl.sum(tl.where(choices == choice, probabilities, 0.0), 1)
        slot = tl.sum(tl.where(choices == choice, places, 0), 1)
        tl.store(weights_pointer + rows * TOP_K + choice, weight, mask=inside)
        tl.store(slots_pointer + rows * TOP_K + choice, slot, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def place_choices_kernel(  # noqa: PLR0913, PLR0917
    expert_ids_pointer,
    tile_counts_pointer,
    counts_pointer,
    slots_pointer,
    tokens,
    experts,
    TOP_K: constexpr,
    TOKEN_TILE: constexpr,
    EXPERT_TILE: constexpr,
    COUNT_TILE: constexpr,
):
    """One program a tile of tokens: add the rows of earlier experts, and of earlier tiles."""
    tile, num_tiles, ids = tl.program_id(0), tl.num_programs(0), tl.arange(0, EXPERT_TILE)
    earlier, total = tl.zeros([EXPERT_TILE], tl.int32), tl.zeros([EXPERT_TILE], tl.int32)
    for start in range(0, num_tiles, COUNT_TILE):
        tiles = (start + tl.arange(0, COUNT_TILE))[:, None]
        mask = (tiles < num_tiles) & (ids < experts)[None, :]
        counts = tl.load(tile_counts_pointer + tiles * experts + ids[None, :], mask=mask, other=0)
        earlier += tl.sum(tl.where(tiles < tile, counts, 0), 0)
        total += tl.sum(counts, 0)
    if tile == 0:
        tl.store(counts_pointer + ids, total, mask=ids < experts)
    starts = tl.cumsum(total, 0) - total + earlier
    rows = tile * TOKEN_TILE + tl.arange(0, TOKEN_TILE)
    for choice in range(TOP_K):
        places, inside = rows * TOP_K + choice, rows < tokens
        expert = tl.load(expert_ids_pointer + places, mask=inside, other=0)
        is_expert = ids[None, :] == expert[:, None]
        first = tl.sum(tl.where(is_expert, starts[None, :], 0), 1)
        slot = tl.load(slots_pointer + places, mask=inside, other=0)
        tl.store(slots_pointer + places, slot + first, mask=inside)


@triton.jit
def scatter_rows_kernel(  # noqa: PLR0913, PLR0917
    hidden_pointer,
    slots_pointer,
    rows_pointer,
    hidden_stride,
    slots_stride,
    hidden,
    TOP_K: constexpr,
    HIDDEN_TILE: constexpr,
):
    """One program a token and tile of its row, which is read once and written TOP_K times."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * HIDDEN_TILE + tl.arange(0, HIDDEN_TILE)
    inside = columns < hidden
    row = tl.load(hidden_pointer + token * hidden_stride + columns, mask=inside)
    for choice in range(TOP_K):
        slot = tl.load(slots_pointer + token * slots_stride + choice).to(tl.int64)
        tl.store(rows_pointer + slot * hidden + columns, row, mask=inside)


def expert_gate(
    hidden: Tensor, gate_weight: Tensor, top_k: int, renormalise: bool = True
) -> Routed:
    """Choose `top_k` experts a token by softmax over all of them, and count and place the choices.

    Args:
        hidden: [tokens, hidden], rows dense, the row stride free; no tokens is allowed.
        gate_weight: [experts, hidden], hidden's dtype; experts need not be a power of two.
        top_k: choices a token, at most the experts.
        renormalise: whether the weights of a token sum to one.
    """
    _check_gate(hidden, gate_weight, top_k)
    if not runs_triton(hidden):
        return expert_gate_reference(hidden, gate_weight, top_k, renormalise)
    tokens, experts, device = hidden.shape[0], gate_weight.shape[0], hidden.device
    routed = Routed(
        expert_ids=torch.empty((tokens, top_k), dtype=torch.int32, device=device),
        weights=torch.empty((tokens, top_k), dtype=torch.float32, device=device),
        counts=torch.empty(experts, dtype=torch.int32, device=device),
        slots=torch.empty((tokens, top_k), dtype=torch.int32, device=device),
    )
    if tokens:
        _launch(hidden, gate_weight, routed, renormalise)
    else:
        routed.counts.zero_()
    return routed


def _launch(hidden: Tensor, gate_weight: Tensor, routed: Routed, renormalise: bool) -> None:
    """Fill `routed`: one launch for a single tile of tokens, two for more.

    A slot depends on the counts of all tiles, those of lower experts above all, and the programs
    of one launch cannot wait for each other; a race of atomics would make their order random.
    """
    (tokens, top_k), experts = routed.slots.shape, gate_weight.shape[0]
    tiles = gate_tiles(tokens, experts, hidden.element_size())
    num_tiles = triton.cdiv(tokens, tiles["TOKEN_TILE"])
    expert_ids, weights, counts, slots = routed
    tile_counts = counts if num_tiles == 1 else counts.new_empty((num_tiles, experts))
    expert_gate_kernel[(num_tiles,)](
        *(hidden, gate_weight, expert_ids, weights, tile_counts, slots),
        *(hidden.stride(0), gate_weight.stride(0), tokens, hidden.shape[1], experts),
        TOP_K=top_k,
        RENORMALISE=renormalise,
        IS_ONLY_TILE=num_tiles == 1,
        **tiles,
        num_warps=gate_warps(tiles),
        num_stages=3,
    )
    if num_tiles > 1:
        place_choices_kernel[(num_tiles,)](
            *(expert_ids, tile_counts, counts, slots, tokens, experts),
            TOP_K=top_k,
            TOKEN_TILE=tiles["TOKEN_TILE"],
            EXPERT_TILE=tiles["EXPERT_TILE"],
            COUNT_TILE=count_tile(tiles),
            num_warps=4,
        )


def gate_tiles(tokens: int, experts: int, element_size: int) -> dict[str, int]:
    """Tiles of the gate: few tokens a program until there are enough of them to fill a GPU.

    All experts stand in one tile; with many of them tiles shrink, so that probabilities stay in
    registers and 3 stages of both operands in shared memory.
    """
    expert_tile = max(16, 1 << (experts - 1).bit_length())
    depth_tile = max(16, min(128, 32768 // expert_tile) // element_size)
    token_tile = 64 if tokens > 2048 and expert_tile <= 128 else 16
    return {"TOKEN_TILE": token_tile, "EXPERT_TILE": expert_tile, "DEPTH_TILE": depth_tile}


def gate_warps(tiles: dict[str, int]) -> int:
    """Warps a program, so that its probabilities fit their registers."""
    return 4 if tiles["TOKEN_TILE"] * tiles["EXPERT_TILE"] < 4096 else 8


def count_tile(tiles: dict[str, int]) -> int:
    """Tiles of tokens whose counts are added up at once, in registers."""
    return 2048 // tiles["EXPERT_TILE"]


def scatter_rows(hidden: Tensor, routed: Routed) -> Tensor:
    """A copy of each token's row for each of its choices, sorted by expert.

    Args:
        hidden: [tokens, hidden], rows dense, the row stride free.
        routed: of these tokens, as `expert_gate` returns it.

    Returns:
        [tokens * top_k, hidden].
    """
    check_float("hidden", hidden)
    check_shape("hidden", hidden, (None, None), "tokens, hidden")
    check_packed("hidden", hidden)
    check_shape("routed.slots", routed.slots, (hidden.shape[0], None), "tokens of hidden, top_k")
    check_index("routed.slots", routed.slots, torch.int32, hidden)
    check_packed("routed.slots", routed.slots)
    if not runs_triton(hidden):
        return scatter_rows_reference(hidden, routed)
    (tokens, size), top_k = hidden.shape, routed.slots.shape[1]
    rows = torch.empty((tokens * top_k, size), dtype=hidden.dtype, device=hidden.device)
    hidden_tile = min(1024, triton.next_power_of_2(size))
    if tokens:
        scatter_rows_kernel[(tokens, triton.cdiv(size, hidden_tile))](
            *(hidden, routed.slots, rows, hidden.stride(0), routed.slots.stride(0), size),
            TOP_K=top_k,
            HIDDEN_TILE=hidden_tile,
            num_warps=4,
        )
    return rows


def _check_gate(hidden: Tensor, gate_weight: Tensor, top_k: int) -> None:
    check_float("hidden", hidden)
    check_shape("hidden", hidden, (None, None), "tokens, hidden; flatten leading dimensions first")
    check_packed("hidden", hidden)
    check_shape("gate_weight", gate_weight, (None, hidden.shape[1]), "experts, hidden")
    check_like("gate_weight", gate_weight, "hidden", hidden)
    check_packed("gate_weight", gate_weight)
    experts = gate_weight.shape[0]
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(
            f"gate_weight has {experts} experts and must have 1 to {MOST_EXPERTS}: a program keeps "
            "the probabilities of its tokens in registers; split the experts into groups"
        )
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"top_k={top_k} must be between 1 and experts={experts}; check the configuration"
        )

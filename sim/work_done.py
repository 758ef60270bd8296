"""How much work a trace's iterations were: FLOPs and KV bytes, from its decisions' shapes."""

from typing import NamedTuple

import numpy as np

from sim.models.architecture import Architecture
from sim.models.flops import attention_flops_per_pair, layer_flops_per_token
from sim.models.operators import lm_head
from sim.trace import Trace

ARRIVED = ("num_prefills", "prefill_context")
"""Tokens and query-key pairs of prompts that came with their KV: a new token each."""


class WorkDone(NamedTuple):
    """Sums over all iterations of a trace."""

    tokens: int
    flops: int
    """Matrix products, causal: see `sim.models.flops`."""
    kv_bytes_written: int
    kv_bytes_read: int


def work_done(
    trace: Trace, architecture: Architecture, kv_bytes_per_token: int, *,
    computes_prompts: bool = True,
) -> WorkDone:  # fmt: skip
    """Add up what all iterations computed, wrote and read, and what was written where KV moved to.

    A decision that stands for k iterations reads a context that grows by one token a request each.

    Args:
        trace: of any number of replicas.
        architecture: what it served.
        kv_bytes_per_token: of the KV cache, all layers.
        computes_prompts: else they came with their KV, which is written here all the same, and
            each was one token more to compute.
    """
    column = trace.decisions
    repeat, decodes = column["repeat"], column["num_decodes"]
    stored = int(((column["prefill_tokens"] + decodes) * repeat).sum())
    names = ("prefill_tokens", "prefill_pairs") if computes_prompts else ARRIVED
    tokens = int(((column[names[0]] + decodes) * repeat).sum())
    grown = decodes * (repeat * (repeat - 1) // 2)
    decode_context = int((column["decode_context"] * repeat + grown).sum())
    pairs = int((column[names[1]] * repeat).sum()) + decode_context
    sampled = int((column["sampled_tokens"] * repeat).sum())
    read = int((column["prefill_context"] * repeat).sum()) + decode_context
    flops = (
        tokens * layer_flops_per_token(architecture)
        + pairs * architecture.num_layers * attention_flops_per_pair(architecture)
        + sampled * lm_head(architecture).flops_per_token
    )
    moved = trace.hand_overs
    written = stored + int(moved["kv_tokens"][~np.isnan(moved["delivered_s"])].sum())
    written += int(trace.kv_moves["tokens"][~np.isnan(trace.kv_moves["end_s"])].sum())
    return WorkDone(tokens, flops, written * kv_bytes_per_token, read * kv_bytes_per_token)

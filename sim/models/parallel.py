"""The part of a model that one rank of a parallel replica holds, as an architecture of its own.

Costs, weights and KV of a rank then follow from the same formulas as those of a whole model.
"""

from dataclasses import replace

from sim.models.dimensions import Architecture
from sim.models.split import require_parallel, stage_layers


def tensor_part(architecture: Architecture, tp_size: int) -> Architecture:
    """What each of `tp_size` ranks holds of every layer: its heads, columns and vocabulary.

    Raises:
        ValueError: `tp_size` does not divide the heads or the widths.
    """
    require_parallel(architecture, tp_size, 1)
    a = architecture
    return replace(
        a,
        num_heads=a.num_heads // tp_size,
        num_kv_heads=a.num_kv_heads // tp_size,
        intermediate_size=-(-a.intermediate_size // tp_size),
        moe_intermediate_size=a.moe_intermediate_size // tp_size,
        shared_expert_intermediate_size=a.shared_expert_intermediate_size // tp_size,
        vocab_size=-(-a.vocab_size // tp_size),
    )


def stage_part(architecture: Architecture, pp_size: int, stage: int = 0) -> Architecture:
    """The layers of one of `pp_size` stages, embedding and lm_head included in every one.

    Raises:
        ValueError: fewer layers than stages.
    """
    layers = stage_layers(architecture.num_layers, pp_size)[stage]
    sparse = tuple(one - layers.start for one in architecture.sparse_layers if one in layers)
    if not sparse and architecture.sparse_layers:
        # A stage of dense layers alone has no experts.
        return replace(
            architecture, num_layers=len(layers), sparse_layers=(), num_experts=0,
            experts_per_token=0, renormalise_top_k=False, moe_intermediate_size=0,
            shared_expert_intermediate_size=0,
        )  # fmt: skip
    return replace(architecture, num_layers=len(layers), sparse_layers=sparse)

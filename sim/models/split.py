"""How a model is split among the ranks of a replica, and which sizes split it."""

from sim.models.dimensions import Architecture


def stage_layers(num_layers: int, pp_size: int) -> list[range]:
    """Which layers each stage has: as even as they go, the first stages have one more.

    Raises:
        ValueError: fewer layers than stages.
    """
    if not 1 <= pp_size <= num_layers:
        raise ValueError(f"pp_size={pp_size} must lie in 1 to the {num_layers} layers of the model")
    each, more = divmod(num_layers, pp_size)
    starts = [stage * each + min(stage, more) for stage in range(pp_size + 1)]
    return [range(starts[stage], starts[stage + 1]) for stage in range(pp_size)]


def require_parallel(architecture: Architecture, tp_size: int, pp_size: int) -> None:
    """Refuse sizes that do not divide the model.

    KV heads are not repeated: each rank has whole ones of its own.

    Raises:
        ValueError: tp_size does not divide query heads, KV heads or the width of the MLP, or there
            are more stages than layers.
    """
    sizes = {
        "num_heads": architecture.num_heads,
        "num_kv_heads": architecture.num_kv_heads,
    }
    if architecture.num_dense_layers:
        sizes["intermediate_size"] = architecture.intermediate_size
    if architecture.sparse_layers:
        sizes["moe_intermediate_size"] = architecture.moe_intermediate_size
        shared = architecture.shared_expert_intermediate_size
        sizes |= {"shared_expert_intermediate_size": shared} if shared else {}
    if any(size % tp_size for size in sizes.values()):
        most = range(1, architecture.num_kv_heads + 1)
        fitting = [n for n in most if not any(size % n for size in sizes.values())]
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"tp_size={tp_size} must divide {told} of {architecture.name}; "
            f"sizes that do: {', '.join(map(str, fitting))}"
        )
    stage_layers(architecture.num_layers, pp_size)

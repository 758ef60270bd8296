"""The cost of collectives for a GPU: measured on it, on its stand-in, or refused."""

from hardware_models.parts import load_node
from hardware_models.schema import Gpu, Node
from sim.costs.collective_silicon import read_silicon, silicon_gpus
from sim.costs.collective_tables import CollectiveCost, CollectiveTable, Estimate, Measured

DTYPES = {
    "nccl": {"fp16": "half", "bf16": "half", "int8": "int8"},
    "engine": {"fp16": "bfloat16", "bf16": "bfloat16"},
}
"""Our dtype -> the tables'. fp16 and bf16 take the same time, so one of them was measured."""


def measured_collectives(
    gpu: Gpu,
    node: Node | None = None,
    *,
    dtype: str = "bf16",
    all_reduce: str = "nccl",
    version: str | None = None,
) -> CollectiveTable:
    """The cost of collectives inside a node of a GPU, as measured in aiconfigurator-core.

    A GPU that was not measured takes the table of its `proxy_of`: seconds for every byte are scaled
    by the ratio of the GPU links' bandwidths, latencies stay, and every answer is extrapolated.

    Args:
        gpu: the GPU.
        node: where it sits; needed for a GPU that another stands in for.
        dtype: `bf16`, `fp16` or `int8`.
        all_reduce: whose all-reduce: `nccl`, or an engine's own: `vllm`, `sglang`, `trtllm`. All
            other operations are NCCL's.
        version: of NCCL; None: the newest that was measured.

    Raises:
        ValueError: nothing fits; the message lists what there is.
    """
    measured, ratio = gpu.name, None
    if gpu.proxy_of is not None:
        measured, ratio = gpu.proxy_of, _bandwidth_ratio(gpu, gpu.proxy_of, node)
    if measured not in silicon_gpus():
        raise ValueError(
            f"no collectives were measured on {measured}; there are: {', '.join(silicon_gpus())}; "
            "or take LinkCollectives, which needs only datasheets"
        )
    rows, chosen = read_silicon(measured, version=version)
    kept = _named(rows, "nccl", dtype)
    name = f"NCCL {chosen} on {measured}"
    if all_reduce != "nccl":
        own, chosen = read_silicon(measured, all_reduce)
        kept = [row for row in kept if row.operation != "all_reduce"]
        kept += _named(own, "engine", dtype)
        name += f" with the all-reduce of {all_reduce} {chosen}"
    return CollectiveTable(kept, dtype, name=name, bandwidth_ratio=ratio)


class Fallback:
    """One cost where it has an answer, another where it has none; the source says which."""

    def __init__(self, first: CollectiveTable, second: CollectiveCost) -> None:
        self.first = first
        self.second = second

    def seconds(
        self, operation: str, num_ranks: int, payload_bytes: float, num_nodes: int = 1
    ) -> Estimate:
        """Seconds of one collective; see `CollectiveCost`."""
        covered = (operation, num_ranks, num_nodes) in self.first.curves
        cost = self.first if covered else self.second
        return cost.seconds(operation, num_ranks, payload_bytes, num_nodes)


def _named(rows: list[Measured], library: str, dtype: str) -> list[Measured]:
    """The rows of a data type, under our name of it."""
    known = DTYPES[library]
    if dtype not in known:
        raise ValueError(
            f"no collectives of dtype={dtype!r} were measured; there are: {', '.join(known)}"
        )
    return [row._replace(dtype=dtype) for row in rows if row.dtype == known[dtype]]


def _bandwidth_ratio(gpu: Gpu, proxy: str, node: Node | None) -> float:
    """Bandwidth of the links between GPUs here over those where the proxy was measured."""
    if node is None or node.peer_link is None:
        raise ValueError(
            f"{gpu.name} was not measured, and {proxy} stands in for it by the bandwidth of its "
            "links; give the node that it sits in"
        )
    there = load_node(f"{proxy}_x8")
    if there.peer_link is None or node.gpu_topology is not there.gpu_topology:
        raise ValueError(
            f"{proxy} cannot stand in for {gpu.name}: its GPUs meet over "
            f"{there.gpu_topology.name}, those of {node.name} over {node.gpu_topology.name}; take "
            "LinkCollectives, which needs only datasheets"
        )
    return node.peer_link.bandwidth_bytes_per_s / there.peer_link.bandwidth_bytes_per_s

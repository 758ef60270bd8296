"""What experts exchange: transfers between nodes, DeepEP's table, and the sizes of models.

Sections of `megascale_infer.py`. Run by itself: nothing.
"""

import numpy as np
from published import Published, Report, at

from hardware_models.parts import load_gpu, load_link
from hardware_models.schema import peak_flops_per_s
from sim.costs.expert_all_to_all import exchanged_bytes
from sim.costs.expert_nodes import ElementTypes
from sim.costs.link_collectives import NCCL
from sim.expert_setup import sizes_of
from sim.models.architecture import load_architecture
from sim.models.parameters import parameter_counts
from sim.processes.collectives import Collectives
from sim.processes.exact_time import ExactEnvironment
from sim.processes.network import Network
from sim.state.two_kinds import TwoKinds
from sim.units import GB, KIB, US

PORT = load_link("infiniband_200").peak
"""Of one GPU of the Ampere testbed."""
SIZES = tuple(2**power * KIB for power in range(1, 14))
"""2 KiB to 8 MiB."""
NODES = (4, 8, 16, 32)
DEEPEP = {
    8: (77, 98, 114, 127), 16: (118, 63, 195, 74), 32: (155, 48, 273, 53),
    64: (173, 43, 314, 46), 128: (192, 39, 369, 39), 256: (194, 39, 360, 40),
}  # fmt: skip
"""Ranks: microseconds and GB/s of dispatch, and of combine."""
SIZES_OF = {
    "mixtral_8x22b": (33.8, 9.9, 229_376), "dbrx": (15.9, 7.0, 163_840),
    "scaled_moe": (19.3, 14.5, 196_608),
}  # fmt: skip
"""GB of one expert and of attention, and KV bytes of a token."""


def sent_s(num_bytes: float, count: int) -> float:
    """Seconds of so many senders that each send every one of as many receivers a message."""
    network = _network(count, 1.0)
    senders, receivers = np.divmod(np.arange(count * count), count)
    network.environment.run(until=network.transfer_all(senders, receivers + count, num_bytes))
    return network.environment.now


def by_collective_s(num_bytes: float, count: int) -> float:
    """The same as one all-to-all of NCCL among all of them, in which most pairs are empty."""
    network = _network(count, NCCL.bandwidth_share)
    sent = np.zeros((2 * count, 2 * count))
    sent[:count, count:] = num_bytes
    members = Collectives(network, range(2 * count), 1)
    network.environment.run(until=members.all_to_all_uneven(sent))
    return NCCL.launch_s + network.environment.now


def _network(count: int, share: float) -> Network:
    rate = share * PORT.bandwidth_bytes_per_s
    return Network(ExactEnvironment(), TwoKinds((count, count), (rate, rate), PORT.latency_s))


def messages(report: Report) -> None:
    """Transfers from M to N nodes beside NCCL's (section 5); without a tail: nothing is random."""
    where = "Fig. 11-12"
    for size in SIZES:
        ours_s, theirs_s = sent_s(size, 8), by_collective_s(size, 8)
        report.note(f"m2n 8 to 8 {size / KIB:.0f} kib us", ours_s / US)
        report.note(f"nccl 8 to 8 {size / KIB:.0f} kib us", theirs_s / US)
    saved = {size: 1 - sent_s(size, 8) / by_collective_s(size, 8) for size in SIZES}
    report.add(where, "time saved, 256 KiB, 8 to 8", at(0.682), saved[256 * KIB], "{:.1%}")
    report.add(where, "the most saved, 2 KiB to 8 MiB", at(0.808), max(saved.values()), "{:.1%}")
    gains = [1 / (1 - one) for one in saved.values()]
    report.add(where, "throughput, 256 KiB, 8 to 8", at(4.2), 1 / (1 - saved[256 * KIB]))
    report.add(where, "the most throughput, 2 KiB to 8 MiB", at(9.9), max(gains))
    many = [by_collective_s(256 * KIB, count) / sent_s(256 * KIB, count) for count in NODES]
    report.add(where, "throughput, 256 KiB, 4 to 32 nodes", Published(3.3, 5.8), many)


def deepep(report: Report) -> None:
    """The low-latency kernels' bytes, from the sizes of messages and from time and bandwidth."""
    for ranks, row in DEEPEP.items():
        for phase, took_us, rate in (("dispatch", *row[:2]), ("combine", *row[2:])):
            ours = exchanged_bytes(phase, 128, 8, 7168)
            what = f"{phase} over {ranks} ranks (MB)"
            report.add("DeepEP", what, at(took_us * US * rate * GB / 1e6), ours / 1e6)


def sizes(report: Report) -> None:
    """Sizes of the models, derived from their dimensions, and what fills a GPU (section 2.1)."""
    for model, (expert, rest, kv) in SIZES_OF.items():
        ours = sizes_of(load_architecture(model), ElementTypes("bf16", 2, 2))
        report.add("derived", f"{model} an expert (GB)", at(expert), ours.expert_bytes / GB)
        counts = parameter_counts(load_architecture(model))
        words = 2 * (counts["embedding"] + counts["lm_head"])
        in_layers = ours.attention_bytes - words
        report.add("derived", f"{model} attention (GB)", at(rest), in_layers / GB)
        report.add("derived", f"{model} KV a token", at(kv), ours.kv_bytes_per_token, "{:,.0f}")
    gpu = load_gpu("a100_80g")
    rows = peak_flops_per_s(gpu, "bf16") / gpu.peak.memory_bandwidth_bytes_per_s
    report.add("2.3", "rows that fill an A100", at(156), rows, "{:.0f}")
    for model, batch in (("mixtral_8x22b", 624), ("dbrx", 624), ("scaled_moe", 1248)):
        a = load_architecture(model)
        share = a.experts_per_token / a.num_experts
        report.add("2.3", f"{model} batch that fills it", at(batch), rows / share, "{:.0f}")
        if model == "mixtral_8x22b":
            report.add("2.3", "rows an expert at 156", at(39), 156 * share, "{:.0f}")
            report.add("2.3", "share of the peak at 156", at(0.25), 156 * share / rows, "{:.0%}")

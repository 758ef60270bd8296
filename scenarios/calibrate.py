"""`diptych calibrate`: measure this machine, fit the iteration cost, write its node file."""

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hardware_models.calibration import Calibration, FittedCollective, FittedIteration
from hardware_models.carriers import HostMemory
from hardware_models.names import alternatives
from hardware_models.parts import dump_node, load_node, read_node
from hardware_models.processors import ComputeMeasured, Cpu
from hardware_models.schema import Node
from scenarios.tables import console, grid
from sim.costs.calibration_plan import BatchPlan, heldout_batches, training_batches
from sim.costs.fitting import Measured, fit_iteration, jitter_quantiles
from sim.files import claim_file
from sim.provenance import commit, processor

NODE_FOLDER = Path("~/.config/diptych/node")
NODE_NAMES = {"cpu": "this_machine", "cuda": "this_machine_cuda"}
"""A node for each device: what was measured on one says nothing of the other."""
MODEL_NAMES = {"smollm2": "smollm2_135m", "random-llama-0": "tiny_llama"}
"""Models whose architecture is shipped under another name than their weights have."""

CUDA_NAMES = {
    "A100-SXM4-80GB": "a100_80g", "A800-SXM4-80GB": "a800_80g", "H100 80GB HBM3": "h100_sxm",
    "H800": "h800_sxm", "H200": "h200", "H20": "h20", "A10G": "a10g", "L40S": "l40s",
    "L20": "l20", "A40": "a40", "GeForce RTX 4090": "rtx_4090",
    "RTX PRO 6000 Blackwell Server Edition": "rtx_pro_6000",
    "RTX PRO 6000 Blackwell Workstation Edition": "rtx_pro_6000_workstation",
}  # fmt: skip
"""Parts by the name that CUDA gives the device, without its maker. Whole names only: an RTX A4000
is no A40, and an H100 PCIe is no H100 SXM."""


class Device(Enum):
    """What is measured."""

    cpu = "cpu"
    cuda = "cuda"


@dataclass(kw_only=True)
class Options:
    """What the command takes."""

    weights: str = "smollm2"
    """Package name or Hugging Face folder of the model to measure."""
    device: Device = Device.cpu
    """CPU (one thread) or CUDA."""
    repeats: int = 3
    """Timings of each shape, after one that warms up; their mean without stalls counts. With ranks
    above 1, ten times as many rounds of calls; their 10th percentile counts."""
    ranks: int = 1
    """Above 1: measure what so many ranks of this machine send each other, and nothing else."""
    out: str | None = None
    """Node file to write; null: ~/.config/diptych/node/this_machine.yaml, on a GPU
    this_machine_cuda.yaml."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1; 3 is the default")
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks} must be at least 1; 2 measures two ranks")


def main(argv: Sequence[str]) -> int:
    """Calibrate and print how well the fit predicts held-out shapes."""
    if any(word in ("-h", "--help") for word in argv):
        text = OmegaConf.to_yaml(OmegaConf.structured(Options))
        console().print(f"diptych calibrate [key=value ...], with these keys:\n\n{text}")
        return 0
    options = _options(argv)
    path = node_path(options.out, options.device.value)
    require_node_file(path)
    if options.ranks > 1:
        from scenarios import calibrate_ranks

        device, rounds = options.device.value, 10 * options.repeats
        node = store({}, calibrate_ranks.measure(options.ranks, device, rounds), device, path)
        calibrate_ranks.show(node, path)
        if options.ranks == 2 and options.device is Device.cpu:
            calibrate_ranks.show_busy()
        return 0
    node = calibrate(options.weights, options.device.value, options.repeats, path)
    show(node, path)
    return 0


def node_path(out: str | None, device: str) -> Path:
    """Where the node of a device is written."""
    return Path(out or NODE_FOLDER / f"{NODE_NAMES[device]}.yaml").expanduser()


def require_node_file(path: Path) -> None:
    """Refuse a file that cannot be written in the end, before anything is measured.

    Raises:
        ValueError: it is there and no node, or cannot be written.
    """
    claim_file(path)
    if path.exists():
        read_node(path)


def calibrate(weights: str, device: str, repeats: int, path: Path) -> Node:
    """Measure all planned batches, fit, and add the fit to the node file.

    Raises:
        ValueError: no such model or device.
    """
    from rich.progress import Progress

    from backends.calibration import Passes
    from backends.serving import open_model, use_one_thread

    use_one_thread()
    with Progress(console=console(errors=True)) as progress:
        loading = progress.add_task("loading the model", total=None)
        model, transformer = open_model(
            weights, device, lambda text: progress.update(loading, description=text)
        )
        progress.remove_task(loading)
        total = (repeats + 1) * len(planned_batches())
        task = progress.add_task("timing iterations", total=total)
        passes = Passes(transformer, planned_batches(), lambda: progress.advance(task))
        for _ in range(repeats):
            passes.time()
    return write(fit_of(passes.measured(), passes.jitter()), model.name, device, path)


def planned_batches() -> list[BatchPlan]:
    """All batches to time; see `fit_of`."""
    return [*training_batches(), *heldout_batches()]


def fit_of(measured: Sequence[Measured], jitter: Sequence[float] = ()) -> FittedIteration:
    """Fit the first of `planned_batches` and judge the fit on the held-out rest."""
    count = len(training_batches())
    fit = fit_iteration(measured[:count], measured[count:], "fp32")
    fit.jitter = jitter_quantiles(jitter)
    return fit


def write(fit: FittedIteration, model: str, device: str, path: Path) -> Node:
    """Add a fit to the node file of this machine, which is made if it is not there."""
    return store({fit_name(model): fit}, {}, device, path)


def store(
    models: Mapping[str, FittedIteration],
    collectives: Mapping[str, FittedCollective],
    device: str,
    path: Path,
) -> Node:
    """Add fits by name to the node file of this machine; what it holds of others is kept."""
    from backends.calibration import fingerprint, num_threads, torch_version

    identity = fingerprint(device)
    kept = _kept(path, identity, torch_version())
    calibration = Calibration(
        fingerprint=identity,
        torch_version=torch_version(),
        threads=num_threads(),
        models={**(kept.models if kept else {}), **models},
        collectives={**(kept.collectives if kept else {}), **collectives},
    )
    node = describe_machine(device, calibration)
    dump_node(node, path)
    return node


def fit_name(model: str) -> str:
    """What a fit of these weights is filed under: the name that `model=` has for them."""
    return MODEL_NAMES.get(model, model)


def stored(path: Path, model: str, device: str) -> FittedIteration | None:
    """The fit of a node file, if it is of this machine, this torch and this model."""
    from backends.calibration import fingerprint, torch_version

    if not path.exists():
        return None
    calibration = read_node(path).calibration
    if calibration is None or calibration.fingerprint != fingerprint(device):
        return None
    if calibration.torch_version != torch_version():
        return None
    return calibration.models.get(fit_name(model))


def describe_machine(device: str, calibration: Calibration) -> Node:
    """The machine at hand as a node: a GPU from the shipped parts, or this CPU as measured."""
    from backends.calibration import copy_bandwidth_bytes_per_s, gpu_name, matmul_flops_per_s

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    source = f"diptych calibrate on {processor()}, commit {commit()}, {today}"
    if device == "cuda":
        node = load_node(f"{gpu_part(gpu_name())}_x1")
        return replace(node, name=NODE_NAMES[device], calibration=calibration, source=source)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Node(
        name="this_machine",
        cpu=Cpu(
            name="this_cpu",
            architecture=processor(),
            num_cores=os.cpu_count() or 1,
            measured=ComputeMeasured(flops_per_s={"fp32": matmul_flops_per_s()}, source=source),
            source=source,
        ),
        host_memory=HostMemory(
            name="this_memory",
            memory_bytes=memory,
            bandwidth_bytes_per_s=copy_bandwidth_bytes_per_s(),
            source=source,
        ),
        calibration=calibration,
        source=source,
    )


def gpu_part(cuda_name: str) -> str:
    """The shipped part that CUDA's device name means.

    Raises:
        ValueError: none has this very name.
    """
    name = cuda_name.removeprefix("NVIDIA ")
    if name not in CUDA_NAMES:
        raise ValueError(
            f"GPU {cuda_name!r} is not known; {alternatives(name, CUDA_NAMES)}; describe it in a "
            "node YAML of your own"
        )
    return CUDA_NAMES[name]


def show(node: Node, path: Path) -> None:
    """Print what was fitted and where it was written."""
    assert node.calibration is not None
    table = grid(
        f"Calibration of {node.calibration.fingerprint}",
        "model", "shapes fitted", "held out", "median error", "p90 error",
    )  # fmt: skip
    for name, fit in node.calibration.models.items():
        table.add_row(
            name, str(fit.num_shapes), str(fit.num_heldout),
            f"{fit.heldout_median_error:.1%}", f"{fit.heldout_p90_error:.1%}",
        )  # fmt: skip
    console().print(table)
    console().print(f"written to {path}: use it as node={path.stem} cost=fitted")


def _kept(path: Path, fingerprint: str, torch_version: str) -> Calibration | None:
    """What the file holds already, if it is of the same machine and torch."""
    try:
        calibration = read_node(path).calibration
    except ValueError:
        return None
    if calibration is None or calibration.fingerprint != fingerprint:
        return None
    return calibration if calibration.torch_version == torch_version else None


def _options(argv: Sequence[str]) -> Options:
    try:
        given = OmegaConf.from_dotlist(list(argv))
        options: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), given))
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error
    return options

"""Which cost a scenario asks for, made for one rank of its replica. Refuses what cannot answer."""

from pathlib import Path

from hardware_models.schema import Gpu
from sim.costs.base import StagedCost
from sim.costs.fitted import Fitted
from sim.costs.kernel_cost import Communication, KernelCost, Kernels, no_communication
from sim.costs.kernel_model import KernelModel
from sim.costs.layer_tables import LayerKernels
from sim.costs.proxy import Proxied
from sim.costs.replica_communication import link_costs, measured_costs, replica_communication
from sim.costs.roofline import RooflineKernels
from sim.costs.scaled import ScaledIteration
from sim.costs.silicon import open_tables
from sim.costs.silicon_kernels import SiliconKernels
from sim.costs.table_files import read_tables
from sim.memory import Device
from sim.models.architecture import Architecture
from sim.models.parallel import tensor_part
from sim.node_choice import node_of
from sim.scenario import CostFamily, Scenario


def cost_of(scenario: Scenario, architecture: Architecture, device: Device) -> StagedCost:
    """The cost of an iteration of the scenario's replica.

    Raises:
        ValueError: the hardware, the tables or the calibration lack what is asked for.
    """
    if scenario.cost_tables is not None and scenario.cost is not CostFamily.profiled:
        raise ValueError(
            f"cost_tables={scenario.cost_tables} has no effect with cost={scenario.cost.value}; "
            "take cost=profiled, or cost_tables=null"
        )
    if scenario.cost is CostFamily.fitted:
        return _fitted(scenario, device)
    if scenario.cost is CostFamily.scaled:
        return _scaled(scenario, device)
    rank = tensor_part(architecture, scenario.tp_size)
    roofline = _roofline(scenario, rank, device)
    kernels: Kernels = roofline
    if scenario.cost is CostFamily.profiled:
        kernels = _profiled(scenario, rank, device, roofline)
    return KernelCost(
        kernels, scenario.engine.iteration_overhead_s, _communication(scenario, architecture)
    )


def _communication(scenario: Scenario, architecture: Architecture) -> Communication:
    sizes = (scenario.tp_size, scenario.pp_size)
    if sizes == (1, 1):
        return no_communication
    node, dtype = node_of(scenario), scenario.model.dtype
    cost = link_costs(node)
    profiled = scenario.cost is CostFamily.profiled and scenario.cost_tables is None
    if profiled and node.gpu is not None:
        cost = measured_costs(node.gpu, node, dtype.value, scenario.engine.framework)
    return replica_communication(architecture, sizes, dtype.num_bytes, cost)


def _roofline(scenario: Scenario, rank: Architecture, device: Device) -> RooflineKernels:
    dtype = scenario.model.dtype
    return RooflineKernels(
        rank,
        KernelModel.of(device.part, device.bytes_per_s, dtype.value),
        dtype_bytes=dtype.num_bytes,
        kv_dtype_bytes=scenario.model.cache_dtype.num_bytes,
    )


def _profiled(
    scenario: Scenario, rank: Architecture, device: Device, roofline: RooflineKernels
) -> Kernels:
    if scenario.cost_tables is not None:
        tables = read_tables(Path(scenario.cost_tables).expanduser(), scenario.tp_size)
        return LayerKernels(tables, roofline)
    gpu = device.part
    if not isinstance(gpu, Gpu):
        raise ValueError(
            f"cost=profiled has no tables of {device.name}, which has no GPU; take cost=fitted "
            "after `diptych calibrate`, cost=roofline, or cost_tables=FOLDER with your own"
        )
    engine = scenario.engine
    measured = gpu if gpu.proxy_of is None else _load(gpu.proxy_of)
    tables = open_tables(measured.name, engine.framework, engine.framework_version)
    dtype = scenario.model.dtype.value
    theirs = roofline
    if measured is not gpu:
        peak = measured.peak.memory_bandwidth_bytes_per_s
        theirs = roofline.like(model=KernelModel.of(measured, peak, dtype))
    kv_dtype, tp_size = scenario.model.cache_dtype.value, scenario.tp_size
    kernels = SiliconKernels(tables, theirs, dtype=dtype, kv_dtype=kv_dtype, tp_size=tp_size)
    return kernels if measured is gpu else Proxied(kernels, theirs, roofline)


def _scaled(scenario: Scenario, device: Device) -> StagedCost:
    base = scenario.scaling
    if base is None:
        raise ValueError(
            "cost=scaled needs scaling=NAME, the coefficients by degree of parallelism; "
            "`diptych list scaling` has those that there are"
        )
    wanted = (scenario.model.name, device.name, scenario.tp_size)
    if (base.model, base.device, base.tp_size) != wanted or scenario.pp_size > 1:
        raise ValueError(
            f"scaling={base.name} is of model={base.model} on {base.device} with "
            f"tp_size={base.tp_size}, and asked for are model={wanted[0]} on {wanted[1]} with "
            f"tp_size={wanted[2]} and pp_size={scenario.pp_size}; take another scaling, or another "
            "cost"
        )
    return ScaledIteration(base, scenario.engine.iteration_overhead_s)


def _load(name: str) -> Gpu:
    # Here and not above: only proxies are looked up by name.
    from hardware_models.parts import load_gpu

    return load_gpu(name)


def _fitted(scenario: Scenario, device: Device) -> StagedCost:
    node = scenario.machine
    fits = node.calibration.models if node is not None and node.calibration else {}
    name = scenario.model.name
    if (scenario.tp_size, scenario.pp_size) != (1, 1):
        name += f"_tp{scenario.tp_size}_pp{scenario.pp_size}"
    if name not in fits:
        raise ValueError(
            f"cost=fitted needs a calibration of model {name} on {device.name}; "
            f"there is one of: {', '.join(fits) or 'none'}; run `diptych calibrate` and take "
            "node=this_machine, or take cost=roofline"
        )
    fit, dtype = fits[name], scenario.model.dtype.value
    if fit.dtype != dtype:
        raise ValueError(
            f"model.dtype={dtype} was not calibrated, {fit.dtype} was; take model.dtype={fit.dtype}"
        )
    return Fitted(fit)

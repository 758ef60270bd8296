"""One typed record of everything that decides a run. Plain Python makes it, and so does Hydra."""

from dataclasses import dataclass, field
from enum import Enum
from math import isfinite

from hardware_models.scaling import ScalingBase
from hardware_models.schema import Cluster, Gpu, Node
from sim.engine import Engine
from sim.experts import Experts
from sim.faults import Fault, check_faults
from sim.knowledge import Knowledge
from sim.metrics import Slo
from sim.policies.batching.base import Batching
from sim.policies.batching.continuous import Continuous
from sim.policies.cache_eviction.base import CacheEviction
from sim.policies.cache_eviction.lru import Lru
from sim.policies.expert_balance.base import ExpertBalance
from sim.policies.expert_balance.static import Static
from sim.policies.instance_plan.base import InstancePlan
from sim.policies.instance_plan.colocated import Colocated
from sim.policies.micro_batching.base import MicroBatching
from sim.policies.micro_batching.none import WholeBatch
from sim.policies.parallel_plan.base import ParallelPlan
from sim.policies.parallel_plan.tensor import Tensor
from sim.policies.request_order.base import RequestOrder
from sim.policies.request_order.fcfs import Fcfs
from sim.policies.retrieval_overlap.base import RetrievalOverlap
from sim.policies.retrieval_overlap.none import NoOverlap
from sim.policies.routing.base import Routing
from sim.policies.routing.round_robin import RoundRobin
from sim.workload.base import Workload
from sim.workload.default import Default
from sim.workload.token_routing.base import TokenRouting
from sim.workload.token_routing.uniform import Uniform


class Dtype(Enum):
    """Element types of weights, activations and KV."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    fp8 = "fp8"
    int8 = "int8"

    @property
    def num_bytes(self) -> int:
        """Bytes of one element."""
        return {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}[self.value]


class CostFamily(Enum):
    """Where the seconds of an iteration come from."""

    roofline = "roofline"
    """Datasheet peaks."""
    profiled = "profiled"
    """Measured kernels: NVIDIA's tables, or those of `cost_tables`."""
    fitted = "fitted"
    """Coefficients that `diptych calibrate` measured for this model on this node."""
    scaled = "scaled"
    """Coefficients by degree of parallelism: those of `scaling`."""


@dataclass(kw_only=True)
class Model:
    """Which model, in which type."""

    name: str = "llama_3_8b"
    """A shipped architecture; shown in results."""
    config: str | None = None
    """A Hugging Face folder or config.json that takes the place of the shipped one."""
    weights: str = "random"
    """For the real panel: random, smollm2 (the package of that name) or a Hugging Face folder."""
    dtype: Dtype = Dtype.bf16
    """Weights and activations."""
    kv_dtype: Dtype | None = None
    """KV cache; null: as `dtype`."""

    @property
    def cache_dtype(self) -> Dtype:
        """Of the KV cache."""
        return self.kv_dtype or self.dtype


@dataclass(kw_only=True)
class Policies:
    """One rule for every decision."""

    batching: Batching = field(default_factory=Continuous)
    """Which tokens an iteration computes."""
    instance_plan: InstancePlan = field(default_factory=Colocated)
    """Which instances form groups."""
    routing: Routing = field(default_factory=RoundRobin)
    """Which replica serves a request; there is nothing to decide with one."""
    cache_eviction: CacheEviction = field(default_factory=Lru)
    """Which document leaves a tier of the knowledge cache first."""
    request_order: RequestOrder = field(default_factory=Fcfs)
    """Which waiting request with retrieved documents is offered a seat first."""
    retrieval_overlap: RetrievalOverlap = field(default_factory=NoOverlap)
    """Whether a prompt is prefilled before its documents are certain."""
    parallel_plan: ParallelPlan = field(default_factory=Tensor)
    """Where the parts of a replica lie: attention and experts together, or apart."""
    micro_batching: MicroBatching = field(default_factory=WholeBatch)
    """Into which parts a batch is split that goes between attention and experts."""
    expert_balance: ExpertBalance = field(default_factory=Static)
    """Which experts have replicas, and on which node each one lies."""


@dataclass(kw_only=True)
class Scenario:
    """What is simulated. Checked here and, against model and hardware, before a run starts."""

    name: str = "scenario"
    """Of the study; names its results."""
    model: Model = field(default_factory=Model)
    """What is served."""
    engine: Engine = field(default_factory=Engine)
    """The engine's limits."""
    workload: Workload = field(default_factory=Default)
    """What is asked of it."""
    experts: Experts = field(default_factory=Experts)
    """Where attention and experts may lie, for plans that place them."""
    token_routing: TokenRouting = field(default_factory=Uniform)
    """Which experts each token chooses, where a model has some."""
    policy: Policies = field(default_factory=Policies)
    """How it decides."""
    knowledge: Knowledge = field(default_factory=Knowledge)
    """How documents are searched and kept, where the workload retrieves some."""
    node: Node | None = None
    """The machine; exactly one of `node`, `gpu` and `cluster`."""
    gpu: Gpu | None = None
    """Short for a machine with such GPUs."""
    cluster: Cluster | None = None
    """Several machines and the network between them: exactly one of the three."""
    tp_size: int = 1
    """Ranks that share every layer of a replica (tensor parallel)."""
    pp_size: int = 1
    """Stages that share out the layers of a replica (pipeline parallel)."""
    num_replicas: int = 1
    """Copies of the model behind one router: each on such a machine of its own, or on the GPUs of a
    cluster, or where a plan moves KV, of the node."""
    faults: list[Fault] = field(default_factory=list[Fault])
    """GPUs, links and nodes that are slow or dead for a time."""
    detection_s: float = 3.0
    """From a replica's death until the router knows of it, in seconds: three signs of life that do
    not come, one a second."""
    cost: CostFamily = CostFamily.roofline
    """Where seconds come from."""
    cost_tables: str | None = None
    """Folder of measured layers for `cost=profiled` (formats of LLMServingSim and of Vidur); null:
    NVIDIA's tables in the installed package aiconfigurator-core."""
    scaling: ScalingBase | None = None
    """How iterations get faster with more instances: what `cost=scaled` takes, and what a plan of
    elastic instances knows of time; null: such a plan knows a fit to the scenario's own cost."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One run each; several give intervals."""
    slo: Slo = field(default_factory=Slo)
    """What counts for goodput."""
    warm_up: float = 0.1
    """Share of the span of arrivals whose requests are left out at its start."""
    drain: float = 0.1
    """Share left out at its end."""
    accept: dict[str, float] = field(default_factory=dict[str, float])
    """Largest relative error that `diptych validate` accepts, by line of its table."""

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be distinct and not negative; try [0, 1, 2]")
        for name in ("tp_size", "pp_size", "num_replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not (isfinite(self.detection_s) and self.detection_s > 0):
            raise ValueError(
                f"detection_s={self.detection_s} must be above 0 seconds and finite; try 3"
            )
        check_faults(self.faults, self.num_replicas, self.tp_size * self.pp_size)
        if not (self.warm_up >= 0 and self.drain >= 0 and self.warm_up + self.drain < 1):
            raise ValueError(
                f"warm_up={self.warm_up} and drain={self.drain} must not be negative and leave "
                "something between them; try 0.1 each"
            )
        for line, error in self.accept.items():
            if not (isfinite(error) and error > 0):
                raise ValueError(
                    f"accept.{line}={error} must be above 0 and finite; it is a relative error, "
                    "such as 0.1"
                )
        given = {
            name: part.name
            for name in ("node", "gpu", "cluster")
            if (part := getattr(self, name)) is not None
        }
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(f'{name}={part}' for name, part in given.items())} are given "
                "together; give exactly one "
                f"({' or '.join(f'{name}=null' for name in given)} drops the other)"
            )

    @property
    def machine(self) -> Node | None:
        """The node that a replica runs on, where one is named."""
        return self.cluster.node if self.cluster is not None else self.node

"""Parts by name or by file, for plain Python and notebooks; needs no Hydra.

A folder of the user's own has the same layout as this package: `<folder>/gpu/my_gpu.yaml`.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

import yaml

from hardware_models.composition import compose, find_part, part_names
from hardware_models.scaling import ScalingBase
from hardware_models.schema import Cluster, Cpu, Disk, Gpu, HostMemory, Link, Node, Npu
from hardware_models.typed import Place, plain_from, record_from

KINDS: dict[str, type[object]] = {
    "gpu": Gpu,
    "npu": Npu,
    "cpu": Cpu,
    "host": HostMemory,
    "disk": Disk,
    "link": Link,
    "node": Node,
    "cluster": Cluster,
    "scaling": ScalingBase,
}
"""Folder of YAML files -> record that each of its files becomes."""

T = TypeVar("T")


def names(kind: str, folders: Sequence[Path] = ()) -> list[str]:
    """Names of all parts of a kind, sorted.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; there are: {', '.join(KINDS)}")
    return part_names(kind, folders)


def load_gpu(name: str, folders: Sequence[Path] = ()) -> Gpu:
    """A GPU by name; `folders` are searched before the shipped parts."""
    return _load(Gpu, "gpu", name, folders)


def load_npu(name: str, folders: Sequence[Path] = ()) -> Npu:
    """An NPU by name; `folders` are searched before the shipped parts."""
    return _load(Npu, "npu", name, folders)


def load_cpu(name: str, folders: Sequence[Path] = ()) -> Cpu:
    """A CPU by name; `folders` are searched before the shipped parts."""
    return _load(Cpu, "cpu", name, folders)


def load_host(name: str, folders: Sequence[Path] = ()) -> HostMemory:
    """A host memory by name; `folders` are searched before the shipped parts."""
    return _load(HostMemory, "host", name, folders)


def load_disk(name: str, folders: Sequence[Path] = ()) -> Disk:
    """A disk by name; `folders` are searched before the shipped parts."""
    return _load(Disk, "disk", name, folders)


def load_link(name: str, folders: Sequence[Path] = ()) -> Link:
    """A link by name; `folders` are searched before the shipped parts."""
    return _load(Link, "link", name, folders)


def load_node(name: str, folders: Sequence[Path] = ()) -> Node:
    """A node by name, its parts filled in; `folders` are searched before the shipped parts."""
    return _load(Node, "node", name, folders)


def load_cluster(name: str, folders: Sequence[Path] = ()) -> Cluster:
    """A cluster by name, its parts filled in; `folders` are searched before the shipped parts."""
    return _load(Cluster, "cluster", name, folders)


def load_scaling(name: str, folders: Sequence[Path] = ()) -> ScalingBase:
    """A scaling base by name; `folders` are searched before the shipped ones."""
    return _load(ScalingBase, "scaling", name, folders)


def read_part(kind: str, path: Path, folders: Sequence[Path] = ()) -> object:
    """A part from a file of its own; `folders` are where the parts that it names may be."""
    names(kind)
    return record_from(KINDS[kind], compose(kind, path, folders), Place(str(path)))


def read_node(path: Path, folders: Sequence[Path] = ()) -> Node:
    """A node from a file of its own, such as one that a calibration wrote."""
    return cast(Node, read_part("node", path, folders))


def dump_node(node: Node, path: Path) -> None:
    """Write a node as one YAML file, every part spelt out, so that reading it gives an equal node.

    The file appears complete or not at all: it is written beside its place and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plain_from(node), sort_keys=False, allow_unicode=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(cls: type[T], kind: str, name: str, folders: Sequence[Path]) -> T:
    path = find_part(kind, name, folders)
    return record_from(cls, compose(kind, path, folders), Place(str(path)))

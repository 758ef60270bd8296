"""`diptych list`: what there is to choose from."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hardware_models.composition import find_part
from hardware_models.names import alternatives
from hardware_models.parts import KINDS, load_gpu, load_node, names
from scenarios import tables
from scenarios.compose import parse, question, refuse_flags, studies
from scenarios.folders import CONF, user_folders
from sim.models.architecture import known_architectures, load_architecture
from sim.models.parameters import total_parameters
from sim.policies.registry import families, policies, token_routings, workloads
from sim.units import human_bytes

Described = dict[str, str]
"""Name -> one line."""

_PLURALS = {"studies": "study"}


def main(argv: Sequence[str]) -> int:
    """List one group with descriptions, or all groups with their names.

    Raises:
        ValueError: there is no such group.
    """
    command = parse(argv)
    refuse_flags(command, "list")
    folders = user_folders(command.config_dir)
    groups = _groups(command.config_dir, folders)
    wanted = command.overrides
    if not wanted:
        _show_all(groups)
    for name in wanted:
        spellings = (name, f"policy/{name}", name.removesuffix("s"), _PLURALS.get(name, ""))
        chosen = next((spelling for spelling in spellings if spelling in groups), None)
        if chosen is None:
            raise ValueError(f"group {name!r} is not known; {alternatives(name, groups)}")
        _show_one(chosen, groups[chosen]())
    return 0


def show_studies(config_dir: str | None, command: str) -> None:
    """Print the studies with their questions, and how to run one."""
    _show_one("studies", studies(config_dir))
    tables.console().print(f"diptych {command} -cn STUDY [key=value ...]", markup=False)


def _groups(config_dir: str | None, folders: Sequence[Path]) -> dict[str, Callable[[], Described]]:
    def rules(family: str) -> Callable[[], Described]:
        return lambda: {name: _first_line(rule) for name, rule in policies(family, folders).items()}

    def parts(kind: str) -> Callable[[], Described]:
        return lambda: {name: _part(kind, name, folders) for name in names(kind, folders)}

    return {
        "study": lambda: studies(config_dir),
        **{f"policy/{family}": rules(family) for family in families()},
        "workload": lambda: _loads("workload", workloads(folders), folders),
        "token_routing": lambda: _loads("token_routing", token_routings(folders), folders),
        "model": lambda: _models(folders),
        **{kind: parts(kind) for kind in KINDS},
    }


def _show_all(groups: dict[str, Callable[[], Described]]) -> None:
    table = tables.grid(None, "group", "choices", left=2)
    table.columns[1].no_wrap = False
    for name, described in groups.items():
        table.add_row(name, ", ".join(described()))
    out = tables.console()
    out.print(table)
    out.print("`diptych list GROUP` says what each of them is")


def _show_one(title: str, described: Described) -> None:
    table = tables.grid(title, "name", "", left=2)
    table.show_header = False
    table.columns[1].no_wrap = False
    for name, line in described.items():
        table.add_row(name, line)
    tables.console().print(table, markup=False)


def _loads(group: str, kinds: Mapping[str, type[object]], folders: Sequence[Path]) -> Described:
    found = {name: _first_line(kind) for name, kind in kinds.items()}
    return dict(sorted((found | _yaml(group, folders)).items()))


def _models(folders: Sequence[Path]) -> Described:
    found: Described = {}
    for name in known_architectures():
        model = load_architecture(name)
        found[name] = (
            f"{total_parameters(model) / 1e9:.3g} B parameters, {model.num_layers} layers, "
            f"hidden {model.hidden_size}, context {model.max_position_embeddings}"
        )
    return found | _yaml("model", folders)


def _yaml(group: str, folders: Sequence[Path]) -> Described:
    return {
        path.stem: question(path)
        for folder in (CONF, *reversed(folders))
        for path in sorted((folder / group).glob("*.yaml"))
    }


def _part(kind: str, name: str, folders: Sequence[Path]) -> str:
    if kind == "gpu":
        gpu = load_gpu(name, folders)
        peak = gpu.peak
        rate = peak.flops_per_s.get("bf16") or peak.flops_per_s.get("fp16")
        speed = f", {rate / 1e12:,.0f} TFLOP/s in 16 bits" if rate else ""
        return (
            f"{gpu.architecture}, {human_bytes(peak.memory_bytes)} at "
            f"{peak.memory_bandwidth_bytes_per_s / 1e12:.3g} TB/s{speed}"
        )
    if kind == "node":
        node = load_node(name, folders)
        if node.gpu is None:
            return question(find_part(kind, name, folders)) or "no GPU"
        link = f" over {node.gpu_link.name}" if node.gpu_link and node.num_gpus > 1 else ""
        return f"{node.num_gpus} x {node.gpu.name}{link}"
    return question(find_part(kind, name, folders))


def _first_line(kind: type[object]) -> str:
    return (inspect.getdoc(kind) or "").split("\n")[0]

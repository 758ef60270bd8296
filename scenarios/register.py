"""Tells Hydra what there is: the schema of a study, its groups, and where their YAML files are.

A policy, a workload, a token routing and an engine are their own schema; hardware parts are YAML
typed by the field that they land in. Nothing is instantiated by name: the types say it all.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, OmegaConf

from scenarios.launchers.choose import register as register_launchers
from scenarios.study import Study
from sim.engine import Engine
from sim.engine_profiles import ENGINES
from sim.models.architecture import known_architectures
from sim.policies.registry import families, policies, token_routings, workloads
from sim.scenario import Model, Policies

SCHEMA = "schema"
"""What every study's defaults begin with."""
RECORD = "diptych_study"
"""The typed record behind it, under a name that no study of a user's own is likely to take."""

_folders: list[Path] = []
_registered: list[list[tuple[str, int]]] = []
"""What Hydra was last told, as `_rule_files` says it; nothing where that is not known."""


class DiptychSearchPath(SearchPathPlugin):
    """Puts the user's folders and the shipped hardware on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra calls it once for each composition; the first entry that has a file wins."""
        for folder in reversed(_folders):
            search_path.prepend(provider="diptych", path=f"file://{folder}")
        search_path.append(provider="diptych", path="pkg://hardware_models")


def register(folders: Sequence[Path] = ()) -> None:
    """Make all groups known; calling it again replaces what an earlier call made known.

    Telling Hydra takes as long as composing a study does, so that it is told again only where a
    file of the user's own came, went or was edited: shipped rules do not change while a program
    runs.

    Args:
        folders: the user's own, see `scenarios.folders`.

    Raises:
        ValueError: a file of a policy, workload or token routing does not define exactly one.
    """
    _folders[:] = folders
    files = _rule_files(folders)
    if files in _registered:
        return
    _registered.clear()  # first: a file that is refused leaves groups half told
    Plugins.instance().register(DiptychSearchPath)
    store = ConfigStore.instance()
    for group in ("policy", "workload", "token_routing", "model", "engine"):
        store.repo.pop(group, None)
    for family in families():
        for name, kind in policies(family, folders).items():
            store.store(group=f"policy/{family}", name=name, node=kind)
    for name, kind in workloads(folders).items():
        store.store(group="workload", name=name, node=kind)
    for name, kind in token_routings(folders).items():
        store.store(group="token_routing", name=name, node=kind)
    for name in known_architectures():
        store.store(group="model", name=name, node=Model(name=name))
    for name, engine in ENGINES.items():
        store.store(group="engine", name=name, node=_profile(engine), package="_global_")
    register_launchers()
    store.store(name=RECORD, node=_study())
    store.store(name=SCHEMA, node={"defaults": defaults()})
    _registered.append(files)


def _rule_files(folders: Sequence[Path]) -> list[tuple[str, int]]:
    """The user's files that define rules, first folder first, and when each was written."""
    places = ("policies/*/*.py", "workload/*.py", "token_routing/*.py")
    return [
        (str(path.resolve()), path.stat().st_mtime_ns)
        for folder in folders
        for place in places
        for path in sorted(folder.glob(place))
    ]


def defaults() -> list[Any]:
    """One choice for every group, so that a command line can change each without a plus sign."""
    chosen = Policies()
    rules = [
        {f"policy/{family}": _name_of(family, type(getattr(chosen, family)))}
        for family in (field.name for field in fields(Policies))
    ]
    groups = {
        "model": Model().name,
        "workload": "default",
        "token_routing": "uniform",
        "node": None,
        "gpu": None,
        "cluster": None,
        "scaling": None,
    }
    # The engine comes after the policies, one of which it may choose.
    chosen = [*({k: v} for k, v in groups.items()), *rules, {"engine": Engine().name}]
    return [RECORD, *chosen, "_self_"]


def _profile(engine: Engine) -> dict[str, Any]:
    """An engine's fields, and the policy that it starts with unless the command line says other."""
    chosen: list[Any] = ["_self_"]
    if engine.default_batching is not None:
        chosen = [{"override /policy/batching": engine.default_batching}, *chosen]
    return {"defaults": chosen, "engine": asdict(engine)}


def _name_of(family: str, kind: type[object]) -> str:
    return next(name for name, found in policies(family).items() if found is kind)


def _study() -> Any:
    """The schema, with the polymorphic fields open: a default there would refuse its siblings."""
    node = OmegaConf.structured(Study)
    node.workload = node.token_routing = MISSING
    for field in fields(Policies):
        node.policy[field.name] = MISSING
    return node

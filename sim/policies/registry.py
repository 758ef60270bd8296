"""Finds policies, workloads and token routings by scanning: a file's name is the rule's name.

Besides the shipped files: `<folder>/policies/<family>/<rule>.py`, `<folder>/workload/<name>.py` and
`<folder>/token_routing/<name>.py` in folders of the user's own, and entry points of the groups
`diptych.policies.<family>`.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar
from zlib import crc32

from hardware_models.names import alternatives
from sim.policies.base import Policy
from sim.workload.base import Workload
from sim.workload.token_routing.base import TokenRouting

POLICIES = Path(__file__).parent
WORKLOADS = POLICIES.parent / "workload"
USER_MODULES = "diptych_user_"
"""Modules of users' files are named with this in front."""

T = TypeVar("T")


def families() -> list[str]:
    """Decisions that there are policies for, sorted."""
    return sorted(path.parent.name for path in POLICIES.glob("*/base.py"))


def contract(family: str) -> type[Policy]:
    """The abstract class of a family.

    Raises:
        ValueError: there is no such family, or its base.py does not define exactly one policy.
    """
    if family not in families():
        known = alternatives(family, families())
        raise ValueError(f"policy family {family!r} is not known; {known}")
    module = importlib.import_module(f"sim.policies.{family}.base")
    found = [kind for kind in _defined(module, Policy) if inspect.isabstract(kind)]
    return _only(found, f"{POLICIES / family / 'base.py'}", "abstract policy")


def policies(family: str, folders: Sequence[Path] = ()) -> dict[str, type[Policy]]:
    """Every rule of a family by its name; a user's rule takes the place of a shipped one.

    Args:
        family: a folder of `sim/policies`.
        folders: of the user's own, the first one wins.

    Raises:
        ValueError: no such family, or a file that does not define exactly one rule of it.
    """
    base = contract(family)
    shipped = [path for path in _files(POLICIES / family) if path.name != "base.py"]
    found = {
        path.stem: _one(importlib.import_module(f"sim.policies.{family}.{path.stem}"), base)
        for path in shipped
    }
    found |= _entry_points(family, base)
    for folder in reversed(folders):
        for path in _files(folder / "policies" / family):
            found[path.stem] = _one(load_file(path), base)
    return dict(sorted(found.items()))


def workloads(folders: Sequence[Path] = ()) -> dict[str, type[Workload]]:
    """Every workload by its name; a user's one takes the place of a shipped one.

    Shipped files without a workload are helpers of the others; a user's file must define one.

    Raises:
        ValueError: a file defines several workloads, or a user's file none.
    """
    return _scanned("sim.workload", WORKLOADS, Workload, folders)


def token_routings(folders: Sequence[Path] = ()) -> dict[str, type[TokenRouting]]:
    """Every token routing by its name, as `workloads`.

    Raises:
        ValueError: a file defines several token routings, or a user's file none.
    """
    place = WORKLOADS / "token_routing"
    return _scanned("sim.workload.token_routing", place, TokenRouting, folders)


def load_file(path: Path) -> ModuleType:
    """The module of a user's file, under a name of its own. An edited file is read again.

    Raises:
        ValueError: the file cannot be imported; the message names it and says why.
    """
    path = path.resolve()
    key = crc32(f"{path} {path.stat().st_mtime_ns}".encode())
    name = f"{USER_MODULES}{path.stem}_{key:08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while it is being read.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"{path}: cannot be imported ({type(error).__name__}: {error}); mend the file"
        ) from error
    return module


def user_files() -> list[Path]:
    """Files that `load_file` has read: another process reads them too, before it unpickles.

    One that was removed since is left out: nothing of it can be in use there.
    """
    found = [
        Path(module.__file__)
        for name, module in sys.modules.items()
        if name.startswith(USER_MODULES) and module.__file__
    ]
    return [path for path in dict.fromkeys(found) if path.exists()]


def _entry_points(family: str, base: type[T]) -> dict[str, type[T]]:
    found: dict[str, type[T]] = {}
    for name, target in _installed(f"diptych.policies.{family}"):
        if isinstance(target, ModuleType):
            found[name] = _one(target, base)
        elif isinstance(target, type) and issubclass(target, base):
            found[name] = target
        else:
            raise ValueError(
                f"entry point {name} of diptych.policies.{family} is {target!r} and must be a "
                f"{base.__name__} or a module with one; mend the package that declares it"
            )
    return found


@lru_cache(maxsize=32)
def _installed(group: str) -> tuple[tuple[str, object], ...]:
    """Entry points do not change while a program runs, and reading them takes a while."""
    return tuple((point.name, point.load()) for point in entry_points(group=group))


def _scanned(
    package: str, place: Path, base: type[T], folders: Sequence[Path]
) -> dict[str, type[T]]:
    """Rules of a package that holds helpers too, then those of the users' folders of its name."""
    found: dict[str, type[T]] = {}
    for path in _files(place):
        module = importlib.import_module(f"{package}.{path.stem}")
        if kinds := _concrete(module, base):
            found[path.stem] = _only(kinds, str(path), base.__name__)
    for folder in reversed(folders):
        for path in _files(folder / place.name):
            found[path.stem] = _one(load_file(path), base)
    return dict(sorted(found.items()))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))


def _one(module: ModuleType, base: type[T]) -> type[T]:
    return _only(_concrete(module, base), str(module.__file__), base.__name__)


def _concrete(module: ModuleType, base: type[T]) -> list[type[T]]:
    return [kind for kind in _defined(module, base) if not inspect.isabstract(kind)]


def _defined(module: ModuleType, base: type[T]) -> Iterable[type[T]]:
    """Subclasses of `base` that the module itself defines, not those that it imports."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base)
        and value.__module__ == module.__name__
    ]  # fmt: skip


def _only(found: Sequence[type[T]], place: str, what: str) -> type[T]:
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise ValueError(
            f"{place}: defines {len(found)} classes that are a concrete {what} ({names}) and must "
            "define exactly one; move the others to files of their own"
        )
    return found[0]

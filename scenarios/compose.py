"""From a command line or a notebook to a checked, typed study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hardware_models.names import alternatives
from scenarios.explain import explain
from scenarios.folders import CONF, user_folders
from scenarios.register import SCHEMA, register
from scenarios.study import Study


class Command(NamedTuple):
    """A command line behind its subcommand."""

    study: str | None
    """`-cn`: name of the study."""
    config_dir: str | None
    """`--config-dir`: a folder of the user's own."""
    overrides: list[str]
    multirun: bool = False
    flags: tuple[str, ...] = ()
    """Other flags, which are Hydra's."""


_TAKE_A_VALUE = {
    "-cn": "study", "--config-name": "study",
    "-cd": "config_dir", "--config-dir": "config_dir",
}  # fmt: skip

DROPS = {f"{part}=null": f"~{part}" for part in ("node", "gpu", "cluster", "scaling")}
"""A group that is set to null leaves the defaults, which Hydra spells with a tilde."""


def parse(argv: Sequence[str]) -> Command:
    """Split arguments into the study, the folder, overrides and Hydra's own flags.

    Raises:
        ValueError: a flag lacks its value.
    """
    named: dict[str, str] = {}
    overrides: list[str] = []
    flags: list[str] = []
    rest = iter(argv)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in _TAKE_A_VALUE:
            value = value if equals else next(rest, "")
            if not value:
                raise ValueError(f"{flag} needs a value after it; `diptych list` shows the studies")
            named[_TAKE_A_VALUE[flag]] = value
        elif argument.startswith("-"):
            flags.append(argument)
        else:
            overrides.append(argument)
    multirun = any(flag in ("-m", "--multirun") for flag in flags)
    others = tuple(flag for flag in flags if flag not in ("-m", "--multirun"))
    study = named.get("study")
    return Command(
        study.removesuffix(".yaml") if study else None,
        named.get("config_dir"), overrides, multirun, others,
    )  # fmt: skip


def refuse_flags(command: Command, name: str) -> None:
    """Refuse what only `diptych run` hands on to Hydra.

    Raises:
        ValueError: there is such a flag.
    """
    flags = [*command.flags, *(["-m"] if command.multirun else [])]
    if flags:
        raise ValueError(
            f"{' '.join(flags)} has no meaning for `diptych {name}`; leave it out (`diptych run` "
            "takes -m and Hydra's flags)"
        )


def compose_study(
    study: str = SCHEMA, overrides: Sequence[str] = (), config_dir: str | None = None
) -> Study:
    """The study that a command line stands for, all parts filled in and checked one by one.

    Args:
        study: name of a YAML study, shipped or in a folder of the user's own.
        overrides: as on the command line: `workload.rate_per_s=4`, `policy/batching=static`.
        config_dir: a folder of the user's own, see `scenarios.folders`.

    Raises:
        ValueError: a key, type, name or value that is refused.
    """
    return typed(compose_config(study, overrides, config_dir))


def compose_config(
    study: str = SCHEMA,
    overrides: Sequence[str] = (),
    config_dir: str | None = None,
    *,
    with_hydra: bool = False,
) -> DictConfig:
    """As `compose_study`, before it becomes objects."""
    _require_study(study, config_dir)
    register(user_folders(config_dir))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="diptych"):
            chosen = [DROPS.get(override, override) for override in overrides]
            return compose(study, chosen, return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    except YAMLError as error:
        place = " ".join(str(error).split())
        raise ValueError(f"a YAML file cannot be read: {place}; mend the file") from error


def typed(config: DictConfig) -> Study:
    """The objects of a composed configuration.

    Raises:
        ValueError: a key that no schema has, a value that is missing or out of range.
    """
    _refuse_unknown(config, "")
    try:
        study: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error
    if not isinstance(study, Study):
        raise ValueError(
            f"the study is a {type(study).__name__} without the schema; "
            f"begin its defaults with `- {SCHEMA}`"
        )
    return study


def _require_study(study: str, config_dir: str | None) -> None:
    known = studies(config_dir)
    if study not in (SCHEMA, *known):
        raise ValueError(f"study {study!r} is not known; {alternatives(study, known)}")


def _refuse_unknown(config: DictConfig, prefix: str) -> None:
    """A plus sign adds keys to a record that has no such field: they would have no effect."""
    kind: Any = OmegaConf.get_type(config)
    known = getattr(kind, "__dataclass_fields__", None)
    for key in config:
        path = f"{prefix}{key}"
        if known is not None and key not in known:
            raise ValueError(
                f"{path} is not a field of {kind.__name__}; {alternatives(key, known, 'it has')}; "
                "leave it out or correct its name"
            )
        if OmegaConf.is_missing(config, key):
            continue
        value = config[key]
        if isinstance(value, DictConfig):
            _refuse_unknown(value, f"{path}.")


def studies(config_dir: str | None = None) -> dict[str, str]:
    """Every study and its question, which is the comment on the first line of its file."""
    found: dict[str, str] = {}
    for folder in reversed([*user_folders(config_dir), CONF]):
        for path in sorted(folder.glob("*.yaml")):
            found[path.stem] = question(path)
    return dict(sorted(found.items()))


def question(path: Path) -> str:
    """The comment on the first line of a file, or nothing."""
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""

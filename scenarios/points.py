"""The points of a sweep: which there are, and how each is composed.

Hydra composes a study in about a tenth of a second, which would outlast many simulations. Points
that choose the same groups differ in values only: a choice of groups is composed once, and values
are set in a copy of it by Hydra's own function.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from scenarios.compose import DROPS
from scenarios.explain import explain
from scenarios.folders import CONF
from scenarios.register import register

Point = tuple[str, ...]
"""Overrides, as on the command line, that make a point of a study."""
OURS = ("out", "resume", "search")
"""Keys of a study that say what becomes of its sweep, not what it simulates."""


class Composer:
    """Composes the points of one study."""

    def __init__(self, study: str, folders: Sequence[Path]) -> None:
        self._study = study
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._groups: dict[str, bool] = {}
        register(folders)
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="diptych"):
            self._loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(config_loader=self._loader)

    def chosen(self, overrides: Sequence[str], params: Mapping[str, Any]) -> dict[str, Override]:
        """What is said of each key of a sweep or a search.

        Args:
            overrides: of a command line.
            params: `hydra.sweeper.params` of the study, or the space of its search; what the
                command line says of the same key is put in its place.

        Raises:
            ValueError: an override cannot be read.
        """
        try:
            parsed = [
                *self._parser.parse_overrides([f"{key}={value}" for key, value in params.items()]),
                *self._parser.parse_overrides(list(overrides)),
            ]
            return {one.get_key_element(): one for one in parsed if not _is_ours(one)}
        except HydraException as error:
            raise ValueError(explain(error)) from error

    def compose(self, point: Sequence[str]) -> DictConfig:
        """As `compose.compose_config`, of which it is the fast form.

        Raises:
            ValueError: a key, type, name or value that is refused.
        """
        try:
            parsed = self._parser.parse_overrides([DROPS.get(line, line) for line in point])
            later = [one for one in parsed if self._is_value(one)]
            groups = tuple(str(one.input_line) for one in parsed if one not in later)
            if groups not in self._composed:
                self._composed[groups] = self._whole(groups)
            config = copy.deepcopy(self._composed[groups])
            ConfigLoaderImpl._apply_overrides_to_config(later, config)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explain(error)) from error
        return config

    def _whole(self, groups: tuple[str, ...]) -> DictConfig:
        config = self._loader.load_configuration(
            self._study, list(groups), run_mode=RunMode.RUN, from_shell=False
        )
        with open_dict(config):
            del config["hydra"]
        return config

    def _is_value(self, override: Override) -> bool:
        """Whether it sets a value in what is composed, and chooses no group of it."""
        if override.type is not OverrideType.CHANGE or override.is_hydra_override():
            return False
        key = override.key_or_group
        if key not in self._groups:
            self._groups[key] = bool(self._loader.get_group_options(key))
        return not self._groups[key] or isinstance(override.value(), dict)


def each_value_once(values: Mapping[str, Sequence[str]]) -> list[Point]:
    """Points that together have every value, first values first."""
    first = {key: these[0] for key, these in values.items()}
    others = [(key, value) for key, these in values.items() for value in these[1:]]
    return [tuple(first.values()), *(tuple({**first, key: one}.values()) for key, one in others)]


def discrete_values(override: Override) -> list[str]:
    """The overrides, one for each value, that one with commas or a range stands for.

    Raises:
        ValueError: it names none, or no end of them.
    """
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ValueError(
            f"{override.input_line} has no end of values; name them as {key}=1,2,3 or "
            f"{key}=range(1,4), or search it with `diptych search`"
        )
    found = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not found:
        raise ValueError(f"{override.input_line} has no values; a sweep needs one at least")
    return list(dict.fromkeys(found))


def _is_ours(override: Override) -> bool:
    return override.is_hydra_override() or override.key_or_group.partition(".")[0] in OURS

"""What Hydra and OmegaConf complain about, in our words: the value, the rule, the way out."""

from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException

from hardware_models.names import alternatives
from scenarios.launchers import extras


def explain(error: BaseException) -> str:
    """One message of an error of composing; that of any other error as it is."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        to_install = extras.missing(name) if group == "hydra/launcher" else ""
        return to_install or f"{group}={name} is not known; {alternatives(name, error.options)}"
    if isinstance(error, OverrideParseException):
        reason = str(error).splitlines()[0]
        return f"{error.override} cannot be read ({reason}); quote or escape what is special in it"
    lines = str(error).splitlines() or [type(error).__name__]
    missing = [line.strip() for line in lines if "full_key:" in line]
    if "Missing mandatory value" in lines[0] or "MissingMandatoryValue" in type(error).__name__:
        key = missing[0].removeprefix("full_key:").strip() if missing else "it"
        return f"{key} has no value and needs one; give it in the study or as {key}=VALUE"
    cause: Any = error.__cause__
    if cause is None or str(cause) in lines[0]:
        return "\n".join(lines)
    reason = str(cause).splitlines()[0]
    if getattr(cause, "object_type", None) is not None and "not in" in reason:
        return _unknown_key(cause)
    return f"{lines[0].removeprefix('Error merging override ')}: {reason}"


def _unknown_key(cause: Any) -> str:
    """A key that its record lacks. Hydra would advise a plus sign, which no record takes."""
    key = str(cause.full_key)
    if "/" in key:
        return f"{key} is not a group of choices; `diptych list` shows them"
    if cause.object_type is dict:
        return f"{key} is a new key; add it with a plus sign, as +{key}=VALUE"
    known = getattr(cause.object_type, "__dataclass_fields__", ())
    name = key.rpartition(".")[2]
    return (
        f"{key} is not a field of {cause.object_type.__name__}; "
        f"{alternatives(name, known, 'it has')}"
    )

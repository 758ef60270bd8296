"""`diptych`: one word says what to do, the rest composes a study.

Nothing heavy is imported before the word is known, and each command imports its own.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from hardware_models.names import alternatives

COMMANDS = {
    "run": "simulate a study; -m runs its sweep",
    "search": "the best configuration of a study's space, such as the cheapest within the SLO",
    "validate": "run both panels and tell how far apart they are",
    "calibrate": "measure this machine for cost=fitted and for validate",
    "report": "figures, plots and a Perfetto trace of saved results",
    "compare": "two saved results: what was changed, and what it changed",
    "list": "studies, policies, workloads, models, hardware",
}
USAGE = """\
usage: diptych COMMAND [-cn STUDY] [--config-dir DIR] [key=value ...]

{commands}

examples:
  diptych run -cn replica
  diptych run -cn replica policy/batching=static workload.rate_per_s=4 out=runs/mine
  diptych run -m -cn replica policy/batching=static,continuous hydra/launcher=joblib
  diptych run -cn replica --cfg job        (the composed study, without running it)
  diptych report runs/mine
  diptych compare runs/mine runs/other

Studies, policies, models and hardware of your own are found in --config-dir DIR and in the folders
of the variable DIPTYCH_PATH. `diptych run` without -cn lists the studies."""


HELP = {"-h", "--help", "help"}
EXPLAIN_THEMSELVES = {"calibrate"}
"""Commands that answer --help with their own keys."""
MODULES = {"list": "listing"}
"""Commands whose module has another name."""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code.

    0: done. 1: done, but a validation missed or a point of a sweep failed. 2: refused.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _dispatch(arguments)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        except BrokenPipeError:
            # Whoever read the output has gone; what is left in the buffer has no reader either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            sys.stderr.write(f"error: {what}; nothing incomplete was left behind\n")
            return 2
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in HELP:
        sys.stdout.write(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(f"command {name!r} is not known; {alternatives(name, COMMANDS)}")
    if HELP.intersection(rest) and name not in EXPLAIN_THEMSELVES:
        sys.stdout.write(_usage())
        return 0
    module = import_module(f"scenarios.{MODULES.get(name, name)}")
    command: Callable[[list[str]], int] = module.main
    return command(rest)


def _usage() -> str:
    commands = "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
    return USAGE.format(commands=commands) + "\n"


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning to the user is one line, without the place in our code that gave it."""
    sys.stderr.write(f"warning: {message}\n")


if __name__ == "__main__":
    sys.exit(main())

"""Iteration costs for timed runs: of a named calibration, or calibrated between the runs."""

import warnings

from backends.calibration import Passes
from backends.executor import Executor
from scenarios import calibrate
from scenarios.validation.options import Options
from sim.costs.fitted import Fitted
from sim.costs.fitting import jitter_quantiles


class CalibratedCosts:
    """Iteration costs of one model on this machine."""

    def __init__(self, options: Options, transformer: Executor, model: str) -> None:
        """Load the calibration that the options name, or time a first pass.

        Args:
            options: of the validation.
            transformer: what is calibrated, one batch alone.
            model: its name in the calibration.

        Raises:
            ValueError: the named calibration holds none of this model on this machine.
        """
        self._device, self._model = options.device.value, model
        self._path = calibrate.node_path(options.calibration, self._device)
        self._passes = self._fit = None
        if options.calibration is None:
            self._passes = Passes(transformer, calibrate.planned_batches(), lambda: None)
            self._passes.time()
            return
        self._fit = calibrate.stored(self._path, model, self._device)
        if self._fit is None:
            raise ValueError(
                f"calibration={options.calibration} holds none of {model} on this machine; run "
                f"`diptych calibrate weights={options.weights} out={options.calibration}`, or "
                "leave it out"
            )

    def refresh(self, part: int, parts: int) -> None:
        """Time a part of the planned batches once more."""
        if self._passes is not None:
            self._passes.time(part, parts)

    def cost(self, first_pass: int = 0) -> Fitted:
        """The cost; of a calibration between the runs, from its passes since `first_pass`.

        Those before and within a repeat know how fast the machine was then.
        """
        if self._passes is None:
            assert self._fit is not None
            return Fitted(self._fit)
        return Fitted(calibrate.fit_of(self._passes.measured(first_pass)))

    def jitter(self) -> list[float]:
        """Ratios of an iteration's seconds to their mean, of all passes; empty: not measured."""
        if self._passes is None:
            assert self._fit is not None
            return self._fit.jitter
        return jitter_quantiles(self._passes.jitter())

    def spread(self) -> float:
        """By how much the same iteration differs from itself; 0 where nothing was timed again."""
        return 0.0 if self._passes is None else self._passes.spread()

    def keep(self) -> None:
        """Write the fit of all passes as this machine's, where there is none that holds.

        The answers do not need the file: what keeps it from being written is a warning.
        """
        if self._passes is None:
            return
        try:
            if calibrate.stored(self._path, self._model, self._device) is None:
                fit = calibrate.fit_of(self._passes.measured(), self._passes.jitter())
                calibrate.write(fit, self._model, self._device, self._path)
        except (ValueError, OSError) as error:
            warnings.warn(f"the calibration was not kept: {error}", stacklevel=2)

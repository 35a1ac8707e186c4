"""How long training took."""

from __future__ import annotations

from collections.abc import Mapping

from covae_train.data import ImageData
from covae_train.image_model import parameter_count
from covae_train.measures import Estimate, Measure, Settings, register
from covae_train.run import TrainedRun


def seconds_per_epoch(run: TrainedRun) -> float:
    """Seconds of steps, by the clock, over epochs done; for a fit without epochs, the seconds in all."""
    epochs = run.state["step"] / run.state["steps_per_epoch"]
    return float(run.state["seconds"] / (epochs or 1))


def compute(run: TrainedRun, data: ImageData, settings: Settings) -> Mapping[str, Estimate]:
    """As the run recorded it."""
    return {
        "seconds per epoch": Estimate(seconds_per_epoch(run), digits=2),
        "parameters": Estimate(float(parameter_count(run.model)), digits=0),
    }


register(Measure("training-time", "seconds per epoch, and parameters", compute, usual=True))

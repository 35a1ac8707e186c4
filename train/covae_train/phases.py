"""Phases: stretches of training with one loss. A family's training is a list of them, and the loop knows no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Protocol

from torch import Tensor, nn

from covae_train.objective import Batch, Terms

# Any, as a family's loss knows its own kind of model.
Loss = Callable[[Any, Batch], Terms]


class TrainingImages(Protocol):
    """The training images, as a phase that begins may see them; the same ones at every resumption."""

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """At most `limit` images, chosen at random, as the steps see them, with noise for the latents."""

    def images(self) -> Iterator[Tensor]:
        """All images once, in their order, (B, C, H, W) in [0, 1] each."""


# The share of a phase, and the steps, after which it should have got somewhere: small networks on small images say
# nothing for two hundred steps, and recover.
CHECKED_FROM, CHECKED_STEPS = 0.5, 300
Begin = Callable[[Any, TrainingImages], None]


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    name: for the progress bar and messages. epochs: 0 for a phase that is done once it has begun, as a closed-form fit
    is. learning_rate: Adam's; decay: the share of it that half a cosine leaves. loss: what is descended. trains: the
    parameters that learn; None: all. clip: the largest norm of a gradient, per number of an image. begin: what happens
    before its first step, without gradients. usable: whether a model in this phase may be evaluated and exported.
    collapsed: what is wrong with a training that has ended up in a bad local minimum, looked for without gradients
    after each epoch once CHECKED_FROM of the phase, and CHECKED_STEPS of its steps, are done; a training that has is
    begun again, at most `most_restarts` times.
    """

    name: str
    epochs: int
    learning_rate: float = 0.0
    loss: Loss | None = None
    trains: Callable[[Any], Iterable[nn.Parameter]] | None = None
    begin: Begin | None = None
    usable: bool = True
    decay: float = 1.0
    clip: float | None = None
    collapsed: Callable[[Any, TrainingImages], str | None] | None = None
    most_restarts: int = 0

    def rate(self, progress: float) -> float:
        """The learning rate once a share `progress` of the phase's steps is done."""
        return self.learning_rate * (self.decay + (1 - self.decay) * 0.5 * (1 + cos(pi * progress)))


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with its steps: from `start`, up to but not including `stop`."""

    phase: Phase
    start: int
    stop: int

    @property
    def key(self) -> str:
        """What tells a beginning that was done from one that is due, as a run that is extended has another end."""
        return f"{self.phase.name}@{self.start}"


def plan(phases: Sequence[Phase], steps_per_epoch: int) -> list[PlannedPhase]:
    """The phases one after the other."""
    planned, start = [], 0
    for phase in phases:
        stop = start + phase.epochs * steps_per_epoch
        planned.append(PlannedPhase(phase, start, stop))
        start = stop
    return planned


def described(phases: Sequence[Phase]) -> str:
    """`mean 2 epochs, all 4 epochs, variance at once`, for messages."""
    return ", ".join(
        f"{phase.name} {phase.epochs} epoch{'s' * (phase.epochs != 1)}" if phase.epochs else f"{phase.name} at once"
        for phase in phases
        if phase.epochs or phase.begin
    )

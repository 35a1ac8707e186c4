"""The training loop: two phases, constraints by multipliers, checkpoints that resume bit for bit.

Phase `mean` trains the mean alone, every pixel with the same constant variance; phase `all` trains everything. Each has
its learning rate. At the switch Adam keeps what it knows: the moments of all parameters trained so far stay, because
their gradients go on in the same directions and a reset would send every weight of a converged trunk a full step
(± learning rate) away. The spread's parameters have had no gradient, so they have no moments, and Adam's bias
correction, which torch counts per parameter, starts for them at the switch. Right before, the model's head may give
them their first values, from what the first phase left of some training images.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from covae_core.errors import InvalidArgument
from covae_train.config import RunConfig
from covae_train.data import ImageData
from covae_train.errors import CheckpointError, DataError, TrainingError
from covae_train.families import build_model, find_family
from covae_train.objective import BoundTerms, Multipliers, bound_terms
from covae_train.records import Records
from covae_train.run import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    Checkpoint,
    has_run,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from covae_train.threads import use_threads

RECORD_EVERY_STEPS = 10
# At most so many training images are shown to a head's `start_spread`.
START_IMAGES = 1000
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
# Channels last is the faster layout. But fed fewer channels than this, torch's strided 1×1 convolutions then write past
# their buffers in the backward pass (oneDNN issue 6035): wrong gradients, or a crash.
MIN_CHANNELS_LAST = 16


@dataclass(frozen=True)
class StepReport:
    """What one step did: terms in nats per image, averaged over the batch; `seconds` of training so far."""

    step: int
    epoch: int
    mean_only: bool
    seconds: float
    bound: float
    log_prob: float
    kl: float
    entropy: float
    multipliers: dict[str, float]

    def row(self) -> dict[str, float]:
        """One row of `metrics.csv`."""
        names = ("step", "epoch", "mean_only", "seconds", "bound", "log_prob", "kl", "entropy")
        values = {name: float(getattr(self, name)) for name in names}
        return values | {f"multiplier_{name}": value for name, value in self.multipliers.items()}


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its checkpoint is complete. As any interruption, it ends a command with status 130."""


class Trainer:
    """One run: its model, optimisers and position, kept in `folder`.

    Args:
        folder: the run's folder; if it holds a run of the same configuration, that is resumed
        device: torch's name of a device

    Raises:
        CheckpointError: the folder holds a run of another configuration, other data or a damaged checkpoint.
        DataError: fewer than two training images.
    """

    def __init__(self, config: RunConfig, data: ImageData, folder: Path, device: str = "cpu") -> None:
        if len(data.train) < 2:
            raise DataError(f"{data.name}: found {len(data.train)} training image; expected at least 2")
        self.config, self.data, self.folder = config, data, folder
        self.device = torch.device(device)
        use_threads(config.threads)
        torch.manual_seed(config.seed)
        narrow = min(config.widths) < MIN_CHANNELS_LAST
        self.layout = torch.contiguous_format if narrow else torch.channels_last
        self.model = build_model(config).to(self.device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.multipliers = Multipliers(find_family(config.family).targets(config), config.damping).to(self.device)
        self.adam = torch.optim.Adam(self.model.parameters())
        self.dual = torch.optim.SGD(self.multipliers.parameters(), lr=config.multiplier_lr, maximize=True)
        self.random = torch.Generator().manual_seed(config.seed)
        self.batch_size = min(config.batch_size, len(data.train))
        self.steps_per_epoch = len(data.train) // self.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step, self.seconds, self.saved_step = 0, 0.0, -1
        self._data_digest = data.digest
        self._open_folder()

    @property
    def finished(self) -> bool:
        """All epochs are done."""
        return self.step >= self.total_steps

    @property
    def mean_only(self) -> bool:
        """The next step belongs to the first phase."""
        return self.step < self._switch

    @property
    def _switch(self) -> int:
        """The first step of phase `all`."""
        return self.config.mean_epochs * self.steps_per_epoch

    def fit(self, on_step: Callable[[StepReport], None] = lambda report: None) -> None:
        """Train to the end, from wherever the run stands; SIGINT and SIGTERM save and stop.

        Raises:
            TrainingError: a loss is not finite; the last good checkpoint stays.
            Interrupted: a signal came; the checkpoint is up to date.
        """
        columns = list(StepReport(0, 0, True, 0, 0, 0, 0, 0, dict.fromkeys(self.multipliers.values, 0.0)).row())
        records = Records(self.folder / METRICS_FILE, self.folder / "tensorboard", columns, self.step)
        with records, _stop_requests() as stop:
            while not self.finished:
                for batch in self._batches_left_in_epoch():
                    report = self._train_step(batch)
                    if self.step % RECORD_EVERY_STEPS == 0 or self.finished:
                        records.add(report.row())
                    if self.step % self.config.checkpoint_steps == 0 or stop.is_set():
                        self.save()
                    on_step(report)
                    if stop.is_set():
                        raise Interrupted(f"stopped at step {self.step}; the same command resumes from {self.folder}")
            self.save()

    def _batches_left_in_epoch(self) -> Iterator[Tensor]:
        epoch, done = divmod(self.step, self.steps_per_epoch)
        shuffle = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data.train), generator=shuffle)
        for index in range(done, self.steps_per_epoch):
            rows = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield self._augmented(self.data.train[rows])

    def _augmented(self, images: Tensor) -> Tensor:
        """Images on [0, 1], each mirrored with probability ½ where the configuration says so."""
        if self.config.flips:
            mirrored = torch.rand(len(images), generator=self.random) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return self._scaled(images)

    def _scaled(self, images: Tensor) -> Tensor:
        """Bytes as floats on [0, 1], where and how the model wants them."""
        return (images.to(self.device).float() / 255).contiguous(memory_format=self.layout)

    def _train_step(self, images: Tensor) -> StepReport:
        start = time.perf_counter()
        mean_only = self.mean_only
        noise = torch.randn(len(images), *self.model.latent_shape, generator=self.random).to(self.device)
        try:
            if self.step == self._switch > 0:
                self._start_spread()
            self.model.train()
            terms = bound_terms(self.model, images, noise, mean_only=mean_only)
        except InvalidArgument as error:  # a density whose parameters left the finite numbers
            raise self._not_finite(str(error)) from error
        loss = self.multipliers.lagrangian(terms)
        if not torch.isfinite(loss):
            raise self._not_finite(f"the loss is {loss.item()}")
        self.adam.zero_grad()
        self.dual.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.param_groups[0]["lr"] = self.config.mean_learning_rate if mean_only else self.config.learning_rate
        self.adam.step()
        self.dual.step()
        self.multipliers.project()
        epoch = self.step // self.steps_per_epoch
        self.step += 1
        self.seconds += time.perf_counter() - start
        return self._report(terms, epoch, mean_only)

    @torch.no_grad()
    def _start_spread(self) -> None:
        """Let the head begin phase `all` from what phase `mean` left: the same whenever it is done before that step."""
        random = torch.Generator().manual_seed(self.config.seed)
        chosen = torch.randperm(len(self.data.train), generator=random)[:START_IMAGES]
        self.model.eval()

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in torch.split(chosen, self.batch_size):
                images = self._scaled(self.data.train[rows])
                noise = torch.randn(len(rows), *self.model.latent_shape, generator=random).to(self.device)
                yield self.model.decoder(self.model.posterior(images).draw(noise)), images

        self.model.head.start_spread(batches())

    def _report(self, terms: BoundTerms, epoch: int, mean_only: bool) -> StepReport:
        with torch.no_grad():
            bound, log_prob, kl, entropy = (
                value.double().mean().item() for value in (terms.bound, terms.log_prob, terms.kl, terms.entropy)
            )
        multipliers = {name: value.item() for name, value in self.multipliers.values.items()}
        return StepReport(self.step, epoch, mean_only, self.seconds, bound, log_prob, kl, entropy, multipliers)

    def _not_finite(self, what: str) -> TrainingError:
        kept = (
            f"the checkpoint of step {self.saved_step} stays in {self.folder}" if self.saved_step >= 0 else "none yet"
        )
        epoch = self.step // self.steps_per_epoch
        return TrainingError(
            f"step {self.step} (epoch {epoch}): {what}. Last good checkpoint: {kept}. "
            "Try a lower --learning-rate or more --mean-epochs"
        )

    def _open_folder(self) -> None:
        if not has_run(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.config.save(self.folder / CONFIG_FILE)
            except OSError as error:
                raise CheckpointError(f"{self.folder}: cannot be made a run's folder ({error})") from error
            return
        found = load_config(self.folder)
        if found != self.config:
            raise CheckpointError(f"{self.folder}: {_differences(found, self.config)}; choose another --run")
        if (self.folder / CHECKPOINT_FILE).exists():
            self._restore(load_checkpoint(self.folder))

    def save(self) -> None:
        """Write the checkpoint, atomically.

        Raises:
            TrainingError: a weight is not finite; the checkpoint before stays.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._not_finite("a weight is not finite")
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"multipliers.{name}": value for name, value in self.multipliers.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.adam.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{key}"] = value
        tensors["random"] = self.random.get_state()
        state = {
            "step": self.step,
            "phase": "mean" if self.step <= self._switch else "all",
            "finished": self.finished,
            "seconds": self.seconds,
            "steps_per_epoch": self.steps_per_epoch,
            "data_digest": self._data_digest,
        }
        save_checkpoint(self.folder, Checkpoint(tensors, state))
        self.saved_step = self.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.state["data_digest"] != self._data_digest:
            raise CheckpointError(f"{self.folder}: this run began on other images; choose another --run")
        try:
            self.model.load_state_dict(checkpoint.part("model"))
            self.multipliers.load_state_dict(checkpoint.part("multipliers"))
            self._restore_adam(checkpoint.part("adam"))
            self.random.set_state(checkpoint.tensors["random"])
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"{self.folder / CHECKPOINT_FILE}: it does not fit {CONFIG_FILE}: {error}") from error
        self.step = self.saved_step = checkpoint.state["step"]
        self.seconds = checkpoint.state["seconds"]

    def _restore_adam(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if f"{name}.step" in tensors:
                state = {key: tensors[f"{name}.{key}"] for key in ADAM_STATE}
                for key in ("exp_avg", "exp_avg_sq"):
                    # Adam's kernels follow the parameter's memory layout; another one would round differently.
                    state[key] = torch.empty_like(parameter, requires_grad=False).copy_(state[key])
                self.adam.state[parameter] = state


def _differences(found: RunConfig, wanted: RunConfig) -> str:
    ours, theirs = found.model_dump(), wanted.model_dump()
    names = [name for name in theirs | ours if ours.get(name) != theirs.get(name)]
    changed = ", ".join(f"{name} = {ours.get(name)!r} (asked for: {theirs.get(name)!r})" for name in names)
    return f"it holds a run with {changed}"


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

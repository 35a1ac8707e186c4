"""The training loop: phases, constraints by multipliers, checkpoints that resume bit for bit.

Each phase has its loss, its learning rate, the parameters that it trains, and something that may happen before its
first step. Where one phase follows another Adam keeps what it knows: the moments of all parameters trained so far stay,
because their gradients go on in the same directions and a reset would send every weight of a converged trunk a full
step (± learning rate) away. Parameters that have had no gradient have no moments, and Adam's bias correction, which
torch counts per parameter, starts for them when they first have one.
"""

from __future__ import annotations

import operator
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from covae_core.errors import NotFinite
from covae_train.config import RunConfig
from covae_train.data import ImageData, in_units
from covae_train.errors import CheckpointError, DataError, TrainingError
from covae_train.families import build_model, find_family
from covae_train.objective import Batch, Multipliers, Terms
from covae_train.phases import CHECKED_FROM, CHECKED_STEPS, PlannedPhase, plan
from covae_train.records import Records
from covae_train.run import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    Checkpoint,
    alone_in,
    has_run,
    load_checkpoint,
    load_config,
    save_checkpoint,
)
from covae_train.threads import use_threads

RECORD_EVERY_STEPS = 10
CHECKPOINT_STEPS = 500
# Images at a time where a phase sees all of them, and the batch of a family that has no steps.
FIT_BATCH = 256
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
# Channels last is the faster layout. But fed fewer channels than this, torch's strided 1×1 convolutions then write past
# their buffers in the backward pass (oneDNN issue 6035): wrong gradients, or a crash. A transposed convolution to so
# few from a kernel of this size, a dense decoder's last layer, takes a hundred times as long.
MIN_CHANNELS_LAST = 16
LARGE_KERNEL = 16
# Options that only prolong a run: a longer one continues it.
PROLONGING = ("epochs",)


@dataclass(frozen=True)
class StepReport:
    """What one step did: terms in nats per image, averaged over the batch; `seconds` of training so far."""

    step: int
    epoch: int
    phase: str
    seconds: float
    bound: float
    log_prob: float
    kl: float
    entropy: float
    multipliers: dict[str, float]

    def row(self, phase_index: int) -> dict[str, float]:
        """One row of `metrics.csv`; the phase by its number, as the columns are numbers."""
        names = ("step", "epoch", "seconds", "bound", "log_prob", "kl", "entropy")
        values = {name: float(getattr(self, name)) for name in names}
        multipliers = {f"multiplier_{name}": value for name, value in self.multipliers.items()}
        return values | {"phase": float(phase_index)} | multipliers


@dataclass(frozen=True)
class Restart:
    """A training that collapsed: at what step of it, in which epoch, after how many seconds, and why; seed: that of the
    one begun instead, None if it goes on as it is."""

    step: int
    epoch: int
    seconds: float
    why: str
    seed: int | None


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its checkpoint is complete. As any interruption, it ends a command with status 130."""


class Trainer:
    """One run: its model, optimisers and position, kept in `folder`.

    Args:
        folder: the run's folder; if it holds a run of the same configuration, that is resumed; if the configuration
            differs in nothing but more epochs, it is extended
        device: torch's name of a device
        threads: of the CPU. checkpoint_steps: how many lie between two checkpoints; threads change rounding
            alone, the other nothing

    Raises:
        InvalidArgument: the family cannot make such a model.
        CheckpointError: the folder holds a run of another configuration, other data or a damaged checkpoint.
        DataError: fewer than two training images.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        folder: Path,
        device: str = "cpu",
        *,
        threads: int = 1,
        checkpoint_steps: int = CHECKPOINT_STEPS,
    ) -> None:
        if len(data.train) < 2:
            raise DataError(f"{data.name}: found {len(data.train)} training image; expected at least 2")
        self.config, self.data, self.folder = config, data, folder
        self.device, self.checkpoint_steps = torch.device(device), checkpoint_steps
        use_threads(threads)
        self.begun_again: list[Restart] = []
        self._start_afresh()
        family = find_family(config.family)
        self.batch_size = min(getattr(config.options, "batch_size", FIT_BATCH), len(data.train))
        self.steps_per_epoch = len(data.train) // self.batch_size
        self.phases = list(family.phases(config))
        self.plan = plan(self.phases, self.steps_per_epoch)
        self.total_steps = self.plan[-1].stop
        self.epochs = sum(phase.epochs for phase in self.phases)
        self.saved_step, self._ended = -1, False
        self.extended_from: int | None = None
        self._data_digest = data.digest
        self._open_folder()

    @property
    def seed(self) -> int:
        """Of the training that is at work: the configuration's, or a later one's after restarts."""
        return next((item.seed for item in reversed(self.begun_again) if item.seed is not None), self.config.seed)

    def _start_afresh(self) -> None:
        """An untrained model at step 0, of the seed."""
        torch.manual_seed(self.seed)
        model = build_model(self.config).to(self.device)
        self.layout = torch.contiguous_format if is_narrow(model) else torch.channels_last
        self.model = model.to(memory_format=self.layout)  # type: ignore[call-overload]
        held = find_family(self.config.family).constraints(self.config)
        self.multipliers = Multipliers(held.items, held.damping, held.momentum).to(self.device)
        self.adam = torch.optim.Adam(self.model.parameters()) if list(self.model.parameters()) else None
        duals = list(self.multipliers.parameters())
        self.dual = torch.optim.SGD(duals, lr=held.learning_rate, maximize=True) if duals else None
        self.random = torch.Generator().manual_seed(self.seed)
        self.step, self.seconds = 0, 0.0
        self._begun: list[str] = []
        self._entered: str | None = None

    @property
    def finished(self) -> bool:
        """All steps are done, and every phase has begun."""
        return self.step >= self.total_steps and not self._due()

    @property
    def planned(self) -> PlannedPhase:
        """The phase of the next step, or the last one."""
        return next((item for item in self.plan if self.step < item.stop), self.plan[-1])

    def fit(
        self,
        on_step: Callable[[StepReport], None] = lambda report: None,
        on_restart: Callable[[Restart], None] = lambda restart: None,
    ) -> None:
        """Train to the end, from wherever the run stands; SIGINT and SIGTERM save and stop.

        A training that collapses is begun again with the next seed, as often as its phase allows;
        on_restart is told, and told as well where none is left. The rows of the records are those of the last one.

        Raises:
            TrainingError: a loss is not finite; the last good checkpoint stays.
            CheckpointError: another training is at work in the folder.
            Interrupted: a signal came; the checkpoint is up to date.
        """
        with alone_in(self.folder), _stop_requests() as stop:
            while not self._fit_once(stop, on_step, on_restart):
                pass
            self.save()

    def _fit_once(
        self, stop: threading.Event, on_step: Callable[[StepReport], None], on_restart: Callable[[Restart], None]
    ) -> bool:
        """Train to the end, or until the training is begun again; whether it was to the end."""
        empty = StepReport(0, 0, "", 0, 0, 0, 0, 0, dict.fromkeys(self.multipliers.values, 0.0))
        columns = list(empty.row(0))
        with Records(self.folder / METRICS_FILE, self.folder / "tensorboard", columns, self.step) as records:
            while not self.finished:
                self._begin_what_is_due()
                for batch in self._batches_left_in_epoch():
                    phase = self.plan.index(self.planned)
                    report = self._train_step(batch)
                    if self.step % RECORD_EVERY_STEPS == 0 or self.step == self.total_steps:
                        records.add(report.row(phase))
                    restart = self._collapse()  # before a checkpoint says that the epoch is over
                    if restart is not None:
                        self.begun_again.append(restart)
                        if restart.seed is not None:
                            self._start_afresh()
                    if restart is not None or self.step % self.checkpoint_steps == 0:
                        self.save()
                    on_step(report)
                    if restart is not None:
                        on_restart(restart)
                        if restart.seed is not None:
                            return False
                    if stop.is_set():
                        if self.saved_step < self.step:
                            self.save()
                        raise Interrupted(f"stopped at step {self.step}; the same command resumes from {self.folder}")
                self._begin_what_is_due()
        return True

    @torch.no_grad()
    def _collapse(self) -> Restart | None:
        """What is to be done about a training that has collapsed, looked for at the end of an epoch.

        One that had ended before it was prolonged is not begun again: it is somebody's model.
        """
        if self.step % self.steps_per_epoch or (self.begun_again and self.begun_again[-1].seed is None):
            return None
        trained = next(item for item in self.plan if item.start < self.step <= item.stop)
        least = max(CHECKED_FROM * (trained.stop - trained.start), CHECKED_STEPS)
        if trained.phase.collapsed is None or self.step - trained.start < least:
            return None
        self.model.eval()
        why = trained.phase.collapsed(self.model, _TrainingImages(self))
        if why is None:
            return None
        left = not self._ended and len(self.begun_again) < trained.phase.most_restarts
        epoch = self.step // self.steps_per_epoch
        return Restart(self.step, epoch, self.seconds, why, self.seed + 1 if left else None)

    def _batches_left_in_epoch(self) -> Iterator[Tensor]:
        if self.step >= self.total_steps:
            return
        epoch, done = divmod(self.step, self.steps_per_epoch)
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data.train), generator=shuffle)
        for index in range(done, self.steps_per_epoch):
            rows = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield self._augmented(self.data.train[rows])

    def _augmented(self, images: Tensor) -> Tensor:
        """Images on [0, 1], each mirrored with probability ½ where the configuration says so."""
        if self.config.flips:
            mirrored = torch.rand(len(images), generator=self.random) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return self._scaled(images, self.random)

    def _scaled(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Bytes on [0, 1], dequantised where the configuration says so, where and how the model wants them."""
        units = in_units(images.to(self.device), random if self.config.dequantise else None)
        return units.contiguous(memory_format=self.layout)

    def _noise(self, rows: int, random: torch.Generator) -> dict[str, Tensor]:
        return {name: noise.to(self.device) for name, noise in self.model.latent_noise((rows,), random).items()}

    def _train_step(self, images: Tensor) -> StepReport:
        start = time.perf_counter()
        planned = self.planned
        self._enter(planned)
        progress = (self.step - planned.start) / max(planned.stop - planned.start, 1)
        batch = Batch(images, self._noise(len(images), self.random), progress)
        assert planned.phase.loss is not None
        assert self.adam is not None
        # What a layer draws by itself, as dropout does, depends on the step alone: a resumed run draws the same.
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        try:
            self.model.train()
            terms = planned.phase.loss(self.model, batch)
        except NotFinite as error:  # a density whose parameters left the finite numbers
            raise self._not_finite(str(error)) from error
        loss = self.multipliers.lagrangian(terms)
        if not torch.isfinite(loss):
            raise self._not_finite(f"the loss is {loss.item()}")
        self.adam.zero_grad()
        self.multipliers.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if planned.phase.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), planned.phase.clip * self.config.image_size)
        self.adam.param_groups[0]["lr"] = planned.phase.rate(progress)
        self.adam.step()
        if self.dual is not None:
            self.dual.step()
            self.multipliers.project()
        epoch = self.step // self.steps_per_epoch
        self.step += 1
        self.seconds += time.perf_counter() - start
        return self._report(terms, epoch, planned.phase.name)

    def _enter(self, planned: PlannedPhase) -> None:
        """Let those parameters learn that the phase trains."""
        if self._entered == planned.key:
            return
        self._entered = planned.key
        chosen = None if planned.phase.trains is None else {id(p) for p in planned.phase.trains(self.model)}
        for parameter in self.model.parameters():
            parameter.requires_grad_(chosen is None or id(parameter) in chosen)

    def _due(self) -> list[PlannedPhase]:
        return [item for item in self.plan if item.start == self.step and item.key not in self._begun]

    @torch.no_grad()
    def _begin_what_is_due(self) -> None:
        """Let the phases that begin at this step do so, from what those before left; the same at every resumption."""
        for item in self._due():
            if item.phase.begin is not None:
                if self.saved_step < self.step:
                    self.save()  # a beginning may take minutes
                start = time.perf_counter()
                self.model.eval()
                item.phase.begin(self.model, _TrainingImages(self))
                self.seconds += time.perf_counter() - start
            self._begun.append(item.key)

    def _report(self, terms: Terms, epoch: int, phase: str) -> StepReport:
        with torch.no_grad():
            bound, log_prob, kl, entropy = (
                value.double().mean().item() for value in (terms.bound, terms.log_prob, terms.kl, terms.entropy)
            )
        multipliers = {name: value.item() for name, value in self.multipliers.values.items()}
        return StepReport(self.step, epoch, phase, self.seconds, bound, log_prob, kl, entropy, multipliers)

    def _not_finite(self, what: str) -> TrainingError:
        kept = (
            f"the checkpoint of step {self.saved_step} stays in {self.folder}" if self.saved_step >= 0 else "none yet"
        )
        epoch = self.step // self.steps_per_epoch
        return TrainingError(
            f"step {self.step} (epoch {epoch}): {what}. Last good checkpoint: {kept}. "
            "Try a lower --learning-rate, or a longer first phase if the family has one"
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
        started = (self.folder / CHECKPOINT_FILE).exists()
        if found != self.config and not self._prolongs(found, started):
            raise CheckpointError(f"{self.folder}: {_differences(found, self.config)}; choose another --run")
        if started:
            self._restore(load_checkpoint(self.folder))
        if found != self.config:
            self.config.save(self.folder / CONFIG_FILE)

    def _prolongs(self, found: RunConfig, started: bool) -> bool:
        """Whether this configuration is that of the run found, with more epochs of its last phase that trains."""
        ours, theirs = _flat(self.config), _flat(found)
        differing = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
        if not differing or not differing <= set(PROLONGING) or ours.keys() != theirs.keys():
            return False
        before = list(find_family(found.family).phases(found))
        lengths = [(phase.name, phase.epochs) for phase in before]
        now = [(phase.name, phase.epochs) for phase in self.phases]
        changed = [index for index, pair in enumerate(zip(lengths, now, strict=True)) if pair[0] != pair[1]]
        last = max((index for index, phase in enumerate(before) if phase.epochs), default=None)
        if last is None or changed != [last] or now[last][1] <= lengths[last][1]:
            return False
        if started:
            self.extended_from = sum(phase.epochs for phase in before)
        return True

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
            for key, value in self._adam_state(parameter).items():
                tensors[f"adam.{name}.{key}"] = value
        tensors["random"] = self.random.get_state()
        entered = [item for item in self.plan if item.start < self.step or item.key in self._begun]
        before = (entered or self.plan[:1])[-1]
        state = {
            "step": self.step,
            "phase": before.phase.name,
            "usable": (before.phase.usable and self.step > 0) or self.finished,
            "begun": self._begun,
            "finished": self.finished,
            "seconds": self.seconds,
            "steps_per_epoch": self.steps_per_epoch,
            "data_digest": self._data_digest,
            "begun_again": [asdict(item) for item in self.begun_again],
            "ended": self._ended or self.finished,
        }
        save_checkpoint(self.folder, Checkpoint(tensors, state))
        self.saved_step = self.step

    def _adam_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {} if self.adam is None else self.adam.state.get(parameter, {})

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state.get("data_digest") != self._data_digest:
            raise CheckpointError(f"{self.folder}: this run began on other images; choose another --run")
        try:
            self.model.load_state_dict(checkpoint.part("model"))
            self.multipliers.load_state_dict(checkpoint.part("multipliers"))
            self._restore_adam(checkpoint.part("adam"))
            self.random.set_state(checkpoint.tensors["random"])
            self.step = self.saved_step = operator.index(state["step"])
            self.seconds, self._begun = float(state["seconds"]), [str(key) for key in state["begun"]]
            self.begun_again = [Restart(**item) for item in state.get("begun_again", ())]
            self._ended = bool(state.get("ended", state["finished"]))
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{self.folder / CHECKPOINT_FILE}: it does not fit {CONFIG_FILE}: {error}") from error

    def _restore_adam(self, tensors: dict[str, Tensor]) -> None:
        if self.adam is None:
            return
        for name, parameter in self.model.named_parameters():
            if f"{name}.step" in tensors:
                state = {key: tensors[f"{name}.{key}"] for key in ADAM_STATE}
                for key in ("exp_avg", "exp_avg_sq"):
                    # Adam's kernels follow the parameter's memory layout; another one would round differently.
                    state[key] = torch.empty_like(parameter, requires_grad=False).copy_(state[key])
                self.adam.state[parameter] = state


class _TrainingImages:
    """See `covae_train.phases.TrainingImages`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """At most `limit` images, chosen at random, as the steps see them, with noise for the latents."""
        trainer = self._trainer
        random = torch.Generator().manual_seed(trainer.config.seed)
        chosen = torch.randperm(len(trainer.data.train), generator=random)[:limit]
        for rows in torch.split(chosen, trainer.batch_size):
            images = trainer._scaled(trainer.data.train[rows], random)
            yield Batch(images, trainer._noise(len(rows), random))

    def images(self) -> Iterator[Tensor]:
        """All images once, in their order, (B, C, H, W) in [0, 1] each."""
        random = torch.Generator().manual_seed(self._trainer.config.seed)
        for rows in torch.split(self._trainer.data.train, FIT_BATCH):
            yield self._trainer._scaled(rows, random)


def is_narrow(model: nn.Module) -> bool:
    """Whether a convolution inside the network, or a transposed one with a large kernel, has fewer channels than
    MIN_CHANNELS_LAST."""
    inside = [
        module
        for module in model.modules()
        if (isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1))
        or (isinstance(module, nn.ConvTranspose2d) and max(module.kernel_size) >= LARGE_KERNEL)
    ]
    return min((module.out_channels for module in inside), default=0) < MIN_CHANNELS_LAST


def _flat(config: RunConfig) -> dict[str, object]:
    values = config.model_dump()
    options = values.pop("options")
    return {**values, **options}


def _differences(found: RunConfig, wanted: RunConfig) -> str:
    ours, theirs = _flat(found), _flat(wanted)
    names = [name for name in theirs | ours if ours.get(name) != theirs.get(name)]
    changed = ", ".join(f"{name} = {ours.get(name)!r} (asked for: {theirs.get(name)!r})" for name in names)
    return f"it holds a run with {changed}"


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that the first SIGINT, SIGTERM or SIGHUP sets; the second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under `nohup`
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

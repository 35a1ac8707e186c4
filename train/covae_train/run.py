"""A run: the folder of one training, with its configuration, checkpoint and records.

config.json              the frozen configuration
checkpoint.safetensors   model, optimisers, multipliers, random state; step, phase and times in its header
calibration.safetensors  the spread that scores, and the scores of unseen images (`covae_train.calibration`)
metrics.csv              one row each few steps
tensorboard/             the same for TensorBoard
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from covae_core.calibration import Calibration
from covae_core.errors import CovaeError, InvalidArgument
from covae_train.calibration import load_calibration
from covae_train.config import RunConfig
from covae_train.data import in_units, level_noise
from covae_train.errors import CheckpointError
from covae_train.families import Family, build_model, find_family
from covae_train.image_model import ImageModel, Vae

CONFIG_FILE = "config.json"
CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.csv"


@dataclass(frozen=True)
class Checkpoint:
    """All that the rest of a run depends on. Tensors are named `model.*`, `adam.*`, `multipliers.*`, `random`."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with `prefix.`, without it."""
        start = f"{prefix}."
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a crash leaves the checkpoint before.

    Raises:
        CheckpointError: it cannot be written (a full disk, a folder that is gone); the checkpoint before stays.
    """
    path = folder / CHECKPOINT_FILE
    draft = path.with_suffix(".draft")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    try:
        save_file(tensors, draft, metadata={"state": json.dumps(checkpoint.state)})
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); the checkpoint before, if any, stays") from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a run's checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint here; expected the folder of a `covae train` run")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return Checkpoint(tensors, json.loads(file.metadata()["state"]))
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: the checkpoint is damaged ({error}); train again in another folder") from error


def has_run(folder: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (folder / CONFIG_FILE).is_file()


def _family_of(path: Path, name: str) -> Family:
    try:
        return find_family(name)
    except InvalidArgument as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_config(folder: Path) -> RunConfig:
    """Read a run's configuration.

    Raises:
        CheckpointError: it is missing, damaged, or of a family or with an option that this version does not have.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no configuration here; expected the folder of a `covae train` run")
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict) and "family" in values and "options" not in values:
            raise CheckpointError(
                f"{path}: it has no options: a version of Covae before 0.2 began this run; use that one, or train "
                "again with another --run"
            )
        options = _family_of(path, values["family"]).options(**values["options"])
        return RunConfig(**{**values, "options": options})
    except KeyError as error:
        raise CheckpointError(f"{path}: the configuration is damaged (it lacks {error})") from error
    except ValidationError as error:
        unknown = [str(item["loc"][0]) for item in error.errors() if item["type"] == "extra_forbidden"]
        if not unknown:
            raise CheckpointError(f"{path}: the configuration is damaged ({error})") from error
        raise CheckpointError(
            f"{path}: found {', '.join(unknown)}, which this version does not have: another version began this run; "
            "use that one, or train again with another --run"
        ) from error
    except (TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the configuration is damaged ({error})") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """The only training in a run's folder, as long as the context lasts; the lock goes with the process.

    Raises:
        CheckpointError: another one is at work in it.
    """
    with (folder / CONFIG_FILE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another training is at work in this folder; wait for it, or choose another --run"
            ) from None
        yield


@dataclass(frozen=True)
class TrainedRun:
    """A run as evaluation and export see it: `model` is in evaluation mode; `digest` is the SHA-256 of its
    configuration and checkpoint; `calibration`: the scores of unseen images, None of a run that has none, whose model
    scores with what was trained.
    """

    folder: Path
    config: RunConfig
    model: ImageModel
    state: dict[str, Any]
    digest: str
    calibration: Calibration | None = None

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def units(self, images: Tensor, seed: int) -> Tensor:
        """Images (N, C, H, W) uint8 on [0, 1] as the run was trained on them: dequantised, with noise of this seed, if
        they were."""
        return in_units(images, level_noise(seed) if self.config.dequantise else None)


def load_run(folder: Path, *, calibrated: bool = True) -> TrainedRun:
    """Read a run to evaluate or export it. calibrated: with its calibration, if it has one.

    Raises:
        CheckpointError: something is missing or damaged, the run is still in a phase whose model is not usable, or its
            calibration is of another checkpoint or other data.
    """
    config, checkpoint = load_config(folder), load_checkpoint(folder)
    try:
        if not checkpoint.state["usable"]:
            phase = checkpoint.state["phase"]
            raise CheckpointError(
                f"{folder}: this run is still in its phase {phase!r}; resume it with `covae train` first"
            )
        model = build_model(config)
        model.load_state_dict(checkpoint.part("model"))
    except CovaeError:
        raise
    except Exception as error:  # of tampered files: whatever torch, or reading a state, runs into
        raise CheckpointError(f"{folder}: the checkpoint does not fit {CONFIG_FILE}: {error!r}") from error
    # The configuration too: another variance bound, or another family's option, is another model of the same weights.
    content = (folder / CONFIG_FILE).read_bytes() + b"\0" + (folder / CHECKPOINT_FILE).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    found = load_calibration(folder, config.data, digest) if calibrated else None
    if found is not None and isinstance(model, Vae):
        model.spread = found.spread
    return TrainedRun(folder, config, model.eval(), checkpoint.state, digest, found.scores if found else None)

"""Tiny configurations and runs: 8×8 digits, two levels of a few feature maps, seconds at most."""

from covae_train.families import make_config
from covae_train.training import Trainer

TINY = {"data": "digits", "image_shape": (8, 8, 1), "widths": (8, 16), "latent_size": 4, "batch_size": 4}
# A KL target that is exceeded from the start, so that its multiplier has something to do.
TINY |= {"epochs": 3, "mean_epochs": 1, "checkpoint_steps": 1000, "target_kl": 0.1}


def tiny_config(family="sos-vae", **changes):
    rank = {"rank": 3} if family == "sos-vae" else {}
    return make_config(**{**TINY, **rank, "family": family, **changes})


class Crash(Exception):
    """What stops a run in these tests; nothing in the product catches it."""


def crash_at(step):
    """An `on_step` that fails once the run has done so many steps."""

    def on_step(report):
        if report.step == step:
            raise Crash

    return on_step


def trained(config, data, folder, on_step=lambda report: None):
    """A trainer that has been run to its end."""
    trainer = Trainer(config, data, folder)
    trainer.fit(on_step)
    return trainer

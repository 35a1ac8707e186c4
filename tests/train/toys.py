"""Tiny configurations and runs: 8×8 digits, two levels of a few feature maps, seconds at most."""

from covae_train.families import find_family, make_config
from covae_train.mean_first import everything, mean_alone
from covae_train.objective import Batch, Constraint
from covae_train.training import Trainer

TINY = {"data": "digits", "image_shape": (8, 8, 1), "widths": (8, 16), "latent_size": 4, "batch_size": 4}
# A KL target that is exceeded from the start, so that its multiplier has something to do.
# The paper's objective: each of its two phases is what the other objective has, and more.
TINY |= {"epochs": 3, "mean_epochs": 1, "target_kl": 0.1, "objective": "paper"}


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


def trained(config, data, folder, on_step=lambda report: None, **settings):
    """A trainer that has been run to its end."""
    trainer = Trainer(config, data, folder, **settings)
    trainer.fit(on_step)
    return trainer


def targets(config):
    """What each constrained term of a family is held at."""
    return {item.name: item.target for item in find_family(config.family).constraints(config).items}


def kl_and_entropy(**values):
    """Constraints on terms of the bound, by name."""
    return [Constraint(name, lambda terms, name=name: getattr(terms, name), value) for name, value in values.items()]


def bound_terms(model, images, noise, *, mean_only=False, mean_share=0.0):
    """What a step sees of a model whose mean is trained first."""
    loss = mean_alone if mean_only else everything(mean_share)
    return loss(model, Batch(images, {"latent": noise}))


def decoded(model, latent):
    """The density of latents (B, L)."""
    return model.density({"latent": latent})


def mean_density(model, latent):
    """What the first phase sees of it."""
    return model.head.density_around(model.head.mean(model.features({"latent": latent})))

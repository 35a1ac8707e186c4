"""The Lagrangian: worked by hand, equal to the released code's sums over its batch of 25, free of the batch's size."""

import pytest
import torch

from covae_apps.report import REPORTS
from covae_core.errors import InvalidArgument
from covae_train.families import build_model, find_family, make_config
from covae_train.objective import Batch, Multipliers, Terms

from .toys import bound_terms, decoded, kl_and_entropy, tiny_config


def terms_of(log_prob, kl, entropy):
    """Terms whose objective is the likelihood alone, as SOS-VAE's."""
    return Terms(-log_prob.mean(), log_prob, kl, entropy)


RELEASED_BATCH, RELEASED_DAMPING, RELEASED_STEP = 25, 10.0, 1.0


def descend_and_ascend(multipliers, model, dual, terms):
    """One step, in the order of the training loop."""
    model.zero_grad()
    dual.zero_grad()
    loss = multipliers.lagrangian(terms)
    loss.backward()
    model.step()
    dual.step()
    multipliers.project()
    return loss.item()


def test_two_steps_worked_by_hand():
    theta = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    multipliers = Multipliers(kl_and_entropy(kl=2.0), damping=250.0).double()
    model = torch.optim.SGD([theta], lr=1e-3)
    dual = torch.optim.SGD(multipliers.parameters(), lr=25.0, maximize=True)

    def terms():
        return terms_of(-theta.square().expand(2), theta * torch.tensor([1.0, 3.0]).double(), torch.zeros(2))

    # KL: mean 2θ = 4, violation 2; loss 4 + 0·2 + 125·4; slope 2θ + (0 + 250·2)·2 = 1004; λ = 25·2.
    assert descend_and_ascend(multipliers, model, dual, terms()) == pytest.approx(504.0)
    assert theta.item() == pytest.approx(0.996)
    assert multipliers.values["kl"].item() == pytest.approx(50.0)
    # KL: mean 1.992, violation −0.008; loss 0.992016 − 0.4 + 0.008; slope 1.992 + (50 − 2)·2; λ = 50 − 0.2.
    assert descend_and_ascend(multipliers, model, dual, terms()) == pytest.approx(0.600016)
    assert theta.item() == pytest.approx(0.996 - 0.097992)
    assert multipliers.values["kl"].item() == pytest.approx(49.8)


class Toy(torch.nn.Module):
    """Terms that bend with two parameters, one row per number."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([0.7, -0.3], dtype=torch.float64))

    def forward(self, x):
        a, b = self.theta
        return terms_of(-(x - a).square() - b.exp(), (a * x).square() + b.square(), b + torch.sin(a + x))


def released_loss(terms, targets, lagrange):
    """The released code's objective: sums over the batch, damping detached, recon − Σ (λ − damp)(slack − c)."""
    loss = -terms.log_prob.sum()
    for name, target in targets.items():
        total, slack = getattr(terms, name).sum(), target * len(terms.kl)
        damp = RELEASED_DAMPING * (slack - total).detach()
        loss = loss - (lagrange[name] - damp) * (slack - total)
    return loss


def test_the_gradient_is_the_released_codes_divided_by_its_batch():
    targets = {"kl": 1.3, "entropy": 0.4}
    x = torch.linspace(-1, 2, RELEASED_BATCH, dtype=torch.float64)
    ours, theirs = Toy(), Toy()
    multipliers = Multipliers(kl_and_entropy(**targets), RELEASED_DAMPING * RELEASED_BATCH).double()
    with torch.no_grad():
        multipliers.values["kl"].fill_(17.0)
        multipliers.values["entropy"].fill_(3.5)
    multipliers.lagrangian(ours(x)).backward()
    released_loss(theirs(x), targets, {"kl": 17.0, "entropy": 3.5}).backward()
    torch.testing.assert_close(ours.theta.grad, theirs.theta.grad / RELEASED_BATCH)


def test_the_multipliers_are_the_released_codes_after_many_steps():
    targets = {"kl": 0.4, "entropy": -0.6}
    x = torch.linspace(-1, 2, RELEASED_BATCH, dtype=torch.float64)
    ours, theirs, rate = Toy(), Toy(), 1e-6
    multipliers = Multipliers(kl_and_entropy(**targets), RELEASED_DAMPING * RELEASED_BATCH).double()
    model = torch.optim.SGD(ours.parameters(), lr=rate * RELEASED_BATCH)
    dual = torch.optim.SGD(multipliers.parameters(), lr=RELEASED_STEP * RELEASED_BATCH, maximize=True)
    lagrange = dict.fromkeys(targets, 0.0)
    for _ in range(40):
        terms = theirs(x)
        violations = {name: getattr(terms, name).sum().item() - RELEASED_BATCH * targets[name] for name in targets}
        (slope,) = torch.autograd.grad(released_loss(terms, targets, lagrange), theirs.theta)
        with torch.no_grad():
            theirs.theta -= rate * slope
        lagrange = {name: max(lagrange[name] + RELEASED_STEP * violations[name], 0.0) for name in targets}
        descend_and_ascend(multipliers, model, dual, ours(x))
    assert min(lagrange.values()) > 1
    torch.testing.assert_close(ours.theta.detach(), theirs.theta.detach(), rtol=1e-8, atol=1e-10)
    for name, value in lagrange.items():
        assert multipliers.values[name].item() == pytest.approx(value, rel=1e-8)


def test_a_batch_of_every_image_twice_gives_the_same_objective_and_gradients():
    x = torch.linspace(-1, 2, 7, dtype=torch.float64)
    found = []
    for batch in (x, torch.cat([x, x])):
        toy, multipliers = Toy(), Multipliers(kl_and_entropy(kl=1.3, entropy=0.4), 250.0).double()
        loss = multipliers.lagrangian(toy(batch))
        loss.backward()
        slopes = [multipliers.values[name].grad for name in ("kl", "entropy")]
        found.append(torch.stack([loss.detach(), *toy.theta.grad, *slopes]))
    torch.testing.assert_close(found[0], found[1])


def test_a_term_without_gradient_leaves_its_multiplier_alone():
    theta = torch.nn.Parameter(torch.tensor(2.0))
    multipliers = Multipliers(kl_and_entropy(kl=1.0, entropy=-100.0), damping=250.0)
    with torch.no_grad():
        multipliers.values["entropy"].fill_(5.0)
    dual = torch.optim.SGD(multipliers.parameters(), lr=25.0, maximize=True)
    terms = terms_of(-theta.expand(3), theta.expand(3), torch.full((3,), 40.0))
    multipliers.lagrangian(terms).backward()
    dual.step()
    assert multipliers.values["entropy"].grad is None
    assert multipliers.values["entropy"].item() == 5.0
    assert multipliers.values["kl"].item() == 25.0


def test_multipliers_never_fall_below_zero():
    theta = torch.nn.Parameter(torch.tensor(0.5))
    multipliers = Multipliers(kl_and_entropy(kl=10.0), damping=250.0)
    dual = torch.optim.SGD(multipliers.parameters(), lr=25.0, maximize=True)
    model = torch.optim.SGD([theta], lr=1e-6)
    for _ in range(3):
        descend_and_ascend(multipliers, model, dual, terms_of(-theta.expand(2), theta.expand(2), theta.expand(2)))
        assert multipliers.values["kl"].item() == 0.0


@pytest.mark.parametrize("family", ["sos-vae", "beta-vae"])
def test_the_terms_are_those_of_the_evidence_lower_bound(family):
    torch.manual_seed(0)
    model = build_model(tiny_config(family)).eval()
    images, noise = torch.rand(3, 1, 8, 8), torch.randn(3, 4)
    with torch.no_grad():
        terms = bound_terms(model, images, noise)
        posterior = model.posteriors(images)["latent"]
        density = decoded(model, posterior.mean + posterior.scale * noise)
        normal = torch.distributions.Normal(posterior.mean, posterior.scale)
        kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(terms.kl, kl)
    torch.testing.assert_close(terms.log_prob, density.log_prob(images))
    torch.testing.assert_close(terms.entropy, density.entropy())
    torch.testing.assert_close(terms.bound, terms.log_prob - terms.kl)


@pytest.mark.parametrize("family", ["sos-vae", "beta-vae"])
def test_while_only_the_mean_is_trained_the_entropy_is_constant_and_the_spread_gets_no_gradient(family):
    model = build_model(tiny_config(family))
    terms = bound_terms(model, torch.rand(4, 1, 8, 8), torch.randn(4, 4), mean_only=True)
    assert not terms.entropy.requires_grad
    Multipliers(kl_and_entropy(kl=1.0, entropy=0.0), 250.0).lagrangian(terms).backward()
    spread = model.head.factor if family == "sos-vae" else model.head.variance
    assert all(parameter.grad is None for parameter in spread.parameters())
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.head.mean.parameters())


def test_a_share_of_the_first_phases_loss_holds_the_mean_and_leaves_the_bound_alone():
    torch.manual_seed(0)
    share = 0.25
    model = build_model(tiny_config("sos-vae"))
    images, noise = torch.rand(3, 1, 8, 8), torch.randn(3, 4)
    before, terms = bound_terms(model, images, noise), bound_terms(model, images, noise, mean_share=share)
    torch.testing.assert_close(terms.bound, before.bound)
    mean = decoded(model, model.posteriors(images)["latent"].draw(noise)).mean
    normal = torch.distributions.Normal(mean, model.head.mean_variance**0.5)
    expected = share * normal.log_prob(images).sum(dim=(1, 2, 3))
    torch.testing.assert_close(terms.objective, before.objective - expected.double().mean())
    Multipliers(kl_and_entropy(kl=1.0), 250.0).lagrangian(terms).backward()
    assert model.head.factor.weight.grad is not None


def test_without_constraints_the_lagrangian_is_the_objective():
    terms = terms_of(torch.ones(3), torch.ones(3), torch.ones(3))
    assert Multipliers([], 0.0).lagrangian(terms) is terms.objective


def test_a_term_without_a_target_counts_once_and_has_no_multiplier():
    kl = torch.tensor([3.0, 5.0], requires_grad=True)
    terms = Terms(torch.tensor(7.0), torch.zeros(2), kl, torch.zeros(2))
    held = Multipliers(kl_and_entropy(kl=None), 250.0, momentum=0.9)
    assert list(held.parameters()) == []
    loss = held.lagrangian(terms)
    loss.backward()
    assert loss.item() == 11
    assert kl.grad.tolist() == [0.5, 0.5]


def test_without_a_target_a_step_descends_the_negative_bound():
    options = {"data": "digits", "image_shape": (8, 8, 1), "widths": (8, 16), "epochs": 2, "target_kl": "none"}
    config = make_config(family="beta-vae", **options)
    assert make_config(family="beta-vae", **{**options, "target_kl": "3.5"}).options.target_kl == 3.5
    family, model = find_family("beta-vae"), build_model(config).eval()
    batch = Batch(torch.rand(4, 1, 8, 8), {"latent": torch.randn(4, *model.latents["latent"])})
    terms = family.phases(config)[-1].loss(model, batch)
    constraints = family.constraints(config)
    held = Multipliers(constraints.items, constraints.damping, constraints.momentum)
    torch.testing.assert_close(held.lagrangian(terms), -terms.bound.mean())


@pytest.mark.parametrize("value", ["abc", -1, 0, "nan", "inf", "None"])
def test_a_target_that_is_none_is_refused_in_one_sentence(value):
    with pytest.raises(InvalidArgument) as refusal:
        tiny_config("beta-vae", target_kl=value)
    assert str(refusal.value) == f"beta-vae: target_kl: found {value!r}, expected a number of nats above 0, or none"


def test_the_papers_vae_counts_the_kl_once_whatever_the_other_rows_hold_it_at():
    arms = {arm.name: arm for arm in REPORTS["structured"]().arms}
    assert (arms["vae"].family, arms["vae"].options) == ("beta-vae", {"target_kl": "none"})
    assert [arm.family for name, arm in arms.items() if name != "vae"] == [name for name in arms if name != "vae"]

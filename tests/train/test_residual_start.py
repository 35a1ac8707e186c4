"""The factor that begins as the residuals' principal components, against a dense one, and what it is for."""

import numpy as np
import pytest
import scipy.linalg
import torch

from covae_core.errors import InvalidArgument
from covae_train.factor import begin_at_residuals, residual_components
from covae_train.families.sos_vae import LowRankHead
from covae_train.image_model import Vae
from covae_train.objective import Batch
from covae_train.posteriors import NormalPosterior
from covae_train.training import Trainer

from .toys import tiny_config, trained


def columns(weights, features):
    """P (B, S, R) of weights (R, C, F + 1) on features (B, F, H, W)."""
    maps = torch.cat([features, torch.ones_like(features[:, :1])], 1).double()
    return torch.einsum("rcf,bfhw->bchwr", weights, maps).flatten(1, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_on_the_same_features_for_every_image_they_are_the_dense_principal_components(rank, channels):
    torch.manual_seed(0)
    features = torch.randn(1, 5, 6, 7).expand(40, -1, -1, -1)
    residuals = torch.randn(40, channels, 6, 7) * torch.linspace(0.1, 2, 7)
    weights = residual_components([(features[:25], residuals[:25]), (features[25:], residuals[25:])], rank)
    assert weights.shape == (rank, channels, 6)
    found = columns(weights, features)[0].numpy()

    maps = torch.cat([features[0], torch.ones(1, 6, 7)]).flatten(1).double().numpy().T
    basis = np.linalg.qr(np.kron(np.eye(channels), maps))[0]
    rows = residuals.flatten(1).double().numpy() @ basis @ basis.T
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    best = vectors[:, ::-1][:, :rank] * np.sqrt(values[::-1][:rank])
    np.testing.assert_allclose(found @ found.T, best @ best.T, atol=1e-5)
    norms = np.linalg.norm(found, axis=0)
    assert (np.diff(norms) <= 0).all(), "the largest first"


@pytest.mark.parametrize("channels", [1, 3])
def test_on_features_of_each_images_own_they_solve_the_generalised_eigenproblem(channels):
    torch.manual_seed(0)
    features = torch.randn(30, 5, 6, 7) * torch.linspace(0.2, 2, 5)[:, None, None]
    residuals = features[:, :1] * torch.randn(30, channels, 1, 1) + 0.3 * torch.randn(30, channels, 6, 7)
    weights = residual_components([(features[:17], residuals[:17]), (features[17:], residuals[17:])], 4)

    maps = torch.cat([features, torch.ones(30, 1, 6, 7)], 1).flatten(2).double().numpy()
    sums = np.einsum("bcs,bfs->bcf", residuals.flatten(2).double().numpy(), maps).reshape(30, -1)
    gram = np.kron(np.eye(channels), np.einsum("bfs,bgs->fg", maps, maps) / 30)
    values, vectors = scipy.linalg.eigh(sums.T @ sums / 30, gram)
    best = vectors[:, ::-1][:, :4] * np.sqrt(values[::-1][:4])
    found = weights.flatten(1).numpy().T
    np.testing.assert_allclose(found @ found.T, best @ best.T, atol=1e-5)


def test_they_leave_alone_what_the_residuals_leave_alone():
    torch.manual_seed(0)
    stroke = (torch.rand(60, 1, 9, 9) < 0.3).float()
    features = torch.cat([1 - stroke, stroke], 1)  # the background's feature is the larger one
    weights = residual_components([(features, stroke * torch.randn(60, 1, 1, 1))], 2)
    found = columns(weights, features).unflatten(1, (9, 9)).square().mean(0)
    background = columns(weights, features)[(stroke == 0).flatten(1)]
    assert float(background.abs().max()) < 1e-4
    assert float(found[..., 0].sum()) > 10


def test_the_columns_that_the_features_cannot_make_are_zero():
    torch.manual_seed(0)
    features = torch.zeros(4, 3, 5, 5)  # dead: the constant alone is left
    weights = residual_components([(features, torch.randn(4, 1, 5, 5))], 3)
    assert weights.shape == (3, 1, 4)
    assert torch.isfinite(weights).all()
    assert float(weights[0, 0, -1].abs()) > 0
    assert not weights[1:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
@pytest.mark.parametrize("where", ["features", "residuals"])
def test_what_is_not_finite_or_has_no_finite_square_is_told(where, value):
    given = {"features": torch.rand(2, 3, 4, 4), "residuals": torch.full((2, 1, 4, 4), 1e-3)}
    given[where][1, 0, 2, 3] = value
    if (where, value) == ("residuals", 1e20):  # finite, and linear in what is returned
        assert torch.isfinite(residual_components([(given["features"], given["residuals"])], 1)).all()
        return
    with pytest.raises(InvalidArgument, match="found NaN or infinite features or residuals"):
        residual_components([(given["features"], given["residuals"])], 1)


class Shown:
    """Training images whose features are given: the model's decoder hands them out in their order."""

    def __init__(self, pairs):
        self.pairs, self.current = pairs, None

    def batches(self, limit=None):
        for features, images in self.pairs:
            self.current = features
            yield Batch(images, {"latent": torch.zeros(len(images), 1)})

    def begin(self, head):
        posterior = NormalPosterior(torch.zeros(1, 1), torch.ones(1, 1))
        model = Vae(torch.nn.Identity(), torch.nn.Identity(), head, (1,))
        model.posteriors = lambda images: {"latent": posterior}
        model.features = lambda latents: self.current
        begin_at_residuals(model, self)


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_heads_factor_is_the_components_of_its_residuals(layout):
    torch.manual_seed(0)
    head = LowRankHead(16, 3, 4, 1e-5).to(memory_format=layout)
    features = torch.randn(12, 16, 5, 6).to(memory_format=layout)
    images = torch.rand(12, 3, 5, 6)
    wanted = columns(residual_components([(features, images - head.mean(features))], 4), features)
    for _ in range(2):  # a second start changes nothing
        Shown([(features[:7], images[:7]), (features[7:], images[7:])]).begin(head)
        found = head.density(features).factor.flatten(2).mT.double()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_columns_that_there_are_no_components_for_keep_their_first_weights():
    head = LowRankHead(2, 1, 2, 1e-5)
    before = head.factor.weight.clone()
    Shown([(torch.zeros(4, 2, 3, 3), torch.rand(4, 1, 3, 3))]).begin(head)
    assert torch.equal(head.factor.weight[1], before[1])
    assert before[1].any()
    assert not torch.equal(head.factor.bias, torch.zeros(2))


def first_full_step(few_digits, folder, **changes):
    reports = []
    trained(tiny_config(**changes), few_digits, folder, reports.append)
    return next(report for report in reports if report.phase == "all")


def test_a_run_begins_its_second_phase_with_a_factor_that_explains_its_residuals(few_digits, tmp_path):
    started = first_full_step(few_digits, tmp_path / "started", residual_start=True)
    plain = first_full_step(few_digits, tmp_path / "plain", residual_start=False)
    assert started.step == plain.step == 13
    assert started.kl == plain.kl, "the start touches the spread alone"
    assert plain.entropy < started.entropy
    assert started.log_prob > 0.9 * plain.log_prob, "a tenth of the misfit is gone, or more"


def test_a_phase_that_begins_sees_each_image_once_in_evaluation_mode(few_digits, tmp_path):
    trainer = Trainer(tiny_config(residual_start=True), few_digits, tmp_path / "run")
    model, seen, steps = trainer.model, [], set()

    def look(module, given, result):
        if not torch.is_grad_enabled():
            steps.add((trainer.step, model.training))
            seen.extend(given[0].flatten(1).tolist())

    model.encoder.register_forward_hook(look)
    trainer.fit()
    assert steps == {(12, False)}
    assert sorted(seen) == sorted((few_digits.train.flatten(1).float() / 255).tolist())


def test_without_a_first_phase_there_are_no_residuals_to_begin_from(few_digits, tmp_path):
    reports = []
    trained(tiny_config(residual_start=True, mean_epochs=0), few_digits, tmp_path / "run", reports.append)
    trained(tiny_config(residual_start=False, mean_epochs=0), few_digits, tmp_path / "plain", reports.append)
    first, second = [report.entropy for report in reports if report.step == 1]
    assert first == second


@torch.no_grad()
def test_a_kernel_of_three_makes_the_columns_along_which_a_shape_moves():
    """Residuals of a blurred edge that moves are its differences: no 1×1 convolution makes these, a 3×3 one does."""
    torch.manual_seed(0)
    shapes = torch.nn.functional.avg_pool2d(torch.rand(60, 1, 12, 12), 3, 1)  # shape: (60, 1, 10, 10)
    moved = shapes - torch.nn.functional.pad(shapes, (1, 0))[..., :-1]
    images = moved * torch.randn(60, 1, 1, 1)
    explained = {}
    for kernel in (1, 3):
        head = LowRankHead(1, 1, 1, 1e-5, kernel=kernel)
        torch.nn.init.zeros_(head.mean.weight)
        torch.nn.init.zeros_(head.mean.bias)
        Shown([(shapes, images)]).begin(head)
        column = head.density(shapes).factor[:, 0, 0, 1:-1, 1:-1].flatten(1)
        wanted = images[:, 0, 1:-1, 1:-1].flatten(1)
        explained[kernel] = torch.cosine_similarity(column, wanted).abs().mean()
    assert explained[1] < 0.5
    assert explained[3] > 0.95


@torch.no_grad()
def test_a_factor_with_a_learned_variance_is_in_units_of_each_pixels_deviation():
    torch.manual_seed(0)
    head = LowRankHead(16, 1, 3, 1e-5, floor=1e-4)
    torch.nn.init.normal_(head.variance.weight)
    features, images = torch.randn(12, 16, 5, 6), torch.rand(12, 1, 5, 6)
    deviation = head.variances(features).sqrt()
    wanted = columns(residual_components([(features, (images - head.mean(features)) / deviation)], 3), features)
    Shown([(features, images)]).begin(head)
    found = (head.scoring_density(features).factor / deviation[:, None]).flatten(2).mT.double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)

"""The torch densities inside exported ONNX graphs: same answers in onnxruntime, for every batch size."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

import covae_core.densities
from covae_core.backends import using_backend
from covae_core.noise import row_seeds
from covae_export.traced_backend import TracedBackend, eliminate

from .oracle import Woodbury, problem

# torch's own exporter still uses what torch deprecates.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name. batch will not be used:UserWarning"),
]

RANK, IMAGE, VARIANCE = 3, (3, 4, 4), 1e-3


class Operations(torch.nn.Module):
    """Score, edit and sample of a decoded density."""

    def __init__(self, kind: str, shared: torch.Tensor | None, full_variance: bool) -> None:
        super().__init__()
        self.kind, self.full_variance = kind, full_variance
        self.register_buffer("shared", shared)

    def forward(self, mean, factor, x, mask, seeds):
        variance = VARIANCE * (1 + mean.square()) if self.full_variance else VARIANCE
        factor = factor if self.shared is None else self.shared
        parameters = {"variance": variance}
        if self.kind in ("low-rank-normal", "hybrid-normal"):
            parameters["factor"] = factor
        if self.kind in ("sparse-precision-normal", "hybrid-normal"):
            # Four of the factor's numbers for each pixel: filters that differ from row to row.
            parameters["filters"] = 0.5 * torch.cat([factor, mean[:, None]], 1)[:, None]
        density = covae_core.densities.DENSITIES[self.kind](mean=mean, **parameters)
        edit = density.condition(mask, x)
        many = density.sample_many(seeds, 2)
        return density.log_prob(x), edit.mean, edit.sample_rows(seeds), many[0], many[1], density.entropy()


def inputs(batch, rank=RANK):
    mean, factor, _ = problem((batch,), rank=rank, image_shape=IMAGE, dtype=np.float32, seed=batch)
    mask = np.random.default_rng(batch).random((batch, *IMAGE[1:])) < 0.3
    x = (mean + 0.3 * np.random.default_rng(batch + 1).standard_normal(mean.shape)).astype(np.float32)
    return {"mean": mean, "factor": factor, "x": x, "mask": mask, "seeds": row_seeds(3, np.arange(batch))}


def export(module, path, arrays):
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    axis = torch.export.Dim("batch")
    with torch.no_grad(), using_backend("torch", TracedBackend()):
        program = torch.onnx.export(
            module.eval(),
            kwargs=tensors,
            dynamo=True,
            dynamic_shapes={name: {0: axis} for name in tensors},
            verbose=False,
        )
    program.save(str(path))
    return program


VARIANTS = {
    "low-rank": ("low-rank-normal", False, False),
    "low-rank, shared factor": ("low-rank-normal", True, False),
    "low-rank, full variance": ("low-rank-normal", False, True),
    "diagonal": ("diagonal-normal", False, False),
    "sparse precision": ("sparse-precision-normal", False, True),
    "hybrid": ("hybrid-normal", False, True),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def exported(request, tmp_path_factory):
    kind, shared, full_variance = request.param
    factor = torch.from_numpy(problem((), rank=RANK, image_shape=IMAGE, dtype=np.float32)[1]) if shared else None
    module = Operations(kind, factor, full_variance)
    path = tmp_path_factory.mktemp("export") / "density.onnx"
    export(module, path, inputs(2))
    return module, onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
def test_the_graph_agrees_with_torch_and_the_oracle(exported, batch):
    module, session = exported
    arrays = inputs(batch)
    wanted = {value.name for value in session.get_inputs()}
    found = session.run(None, {name: array for name, array in arrays.items() if name in wanted})
    expected = module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    # The scores are about 100 nats and the variance 1e-3: float32 residuals are good for 1e-4.
    for value, target in zip(found, expected, strict=True):
        assert value.shape == target.shape
        np.testing.assert_allclose(value, target.numpy(), rtol=1e-5, atol=3e-4)
    if module.kind == "low-rank-normal":
        check_oracle(module, arrays, found)


def check_oracle(module, arrays, found):
    for b in range(len(arrays["mean"])):
        mean, x = arrays["mean"][b], arrays["x"][b]
        factor = arrays["factor"][b] if module.shared is None else module.shared.numpy()
        variance = np.float32(VARIANCE) * (1 + mean**2) if module.full_variance else np.float32(VARIANCE)
        oracle = Woodbury(mean, factor, variance)
        mask = np.broadcast_to(arrays["mask"][b], IMAGE)
        np.testing.assert_allclose(found[0][b], oracle.log_prob(x), rtol=1e-5)
        np.testing.assert_allclose(found[1][b], oracle.conditional_mean(mask, x), atol=1e-4)


class Score(torch.nn.Module):
    """The log-density alone."""

    def forward(self, mean, factor, x):
        return covae_core.densities.LowRankNormal(mean, factor, VARIANCE).log_prob(x)


def test_a_score_of_rank_25_has_a_few_hundred_nodes_and_no_random_or_bit_operator(tmp_path):
    names = ("mean", "factor", "x")
    program = export(Score(), tmp_path / "score.onnx", {name: inputs(2, rank=25)[name] for name in names})
    operators = [node.op_type for node in program.model.graph]
    # 25 steps of about seven nodes, and the rest.
    assert len(operators) < 300
    forbidden = {"RandomNormal", "RandomNormalLike", "BitShift", "BitwiseAnd", "NonZero", "Det", "If", "Loop"}
    assert not forbidden & set(operators)


def test_elimination_equals_inverse_and_log_determinant():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 25, 40, dtype=torch.float64, generator=generator)
    matrices = 1e4 * root @ root.mT + torch.eye(25, dtype=torch.float64)
    inverse, logdet = eliminate(matrices)
    torch.testing.assert_close(
        inverse @ matrices, torch.eye(25, dtype=torch.float64).expand(3, 25, 25), atol=1e-9, rtol=0
    )
    expected = 2 * torch.linalg.cholesky(matrices).diagonal(dim1=1, dim2=2).log().sum(-1)
    torch.testing.assert_close(logdet, expected)

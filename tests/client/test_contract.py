"""The wire contract: a spec survives the way through a config's parameters."""

from dataclasses import replace

import pytest

from covae_core.contract import NUMPY_DTYPES, ModelSpec, Operation
from covae_core.errors import InvalidArgument

SPEC = ModelSpec(
    family="spatial-mvn",
    density="low-rank-normal",
    image_shape=(64, 48, 3),
    latent_shape=(16, 7, 7),
    density_parameters={"factor": (25, 3, 64, 48), "variance": (3, 64, 48)},
    rank=25,
    score_samples=16,
    run_id="a run, “quoted”",
    run_digest="ff00",
)


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, density="diagonal-normal", density_parameters={}, rank=0)])
def test_a_spec_survives_the_parameters(spec):
    parameters = spec.to_parameters()
    assert all(isinstance(value, str) for value in parameters.values())
    assert ModelSpec.from_parameters(parameters) == spec
    assert ModelSpec.from_parameters({**parameters, "execution_mode": "0"}) == spec


@pytest.mark.parametrize("name", list(SPEC.to_parameters()))
def test_a_missing_parameter_is_named(name):
    parameters = SPEC.to_parameters()
    del parameters[name]
    with pytest.raises(InvalidArgument, match=name):
        ModelSpec.from_parameters(parameters)


@pytest.mark.parametrize("malformed", [{"rank": "twenty-five"}, {"image_shape": "5"}, {"density_parameters": "[]"}])
def test_text_that_is_no_json_or_of_another_kind_is_refused(malformed):
    with pytest.raises(InvalidArgument, match=r"malformed: .*; export it again"):
        ModelSpec.from_parameters({**SPEC.to_parameters(), **malformed})


def test_another_contract_version_is_refused_with_both_versions():
    with pytest.raises(InvalidArgument, match="model has 99, this version of Covae speaks 1"):
        ModelSpec.from_parameters({**SPEC.to_parameters(), "contract_version": "99"})


@pytest.mark.parametrize("operation", list(Operation))
def test_every_tensor_has_a_known_dtype_and_size(operation):
    for tensor in (*SPEC.inputs(operation), *SPEC.outputs(operation)):
        assert tensor.dtype in NUMPY_DTYPES
        assert tensor.row_bytes > 0


def test_row_bytes_count_the_factor():
    sizes = {tensor.name: tensor.row_bytes for tensor in SPEC.outputs(Operation.DECODE)}
    assert sizes["factor"] == 25 * 3 * 64 * 48 * 4


def test_operations_name_their_triton_models():
    assert Operation.SCORE.model_name("digits") == "digits_score"

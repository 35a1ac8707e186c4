"""The wire contract: a spec survives the way through a config's parameters."""

from dataclasses import fields, replace

import pytest

from covae_core.contract import NUMPY_DTYPES, ModelSpec, served_name
from covae_core.errors import InvalidArgument
from covae_core.operations import OPERATIONS, Operation, register, split_served_name
from covae_core.warp import WarpSpec

SPEC = ModelSpec(
    family="spatial-mvn",
    image_shape=(64, 48, 3),
    latents={"latent": (16, 7, 7), "pose": (6,)},
    posteriors={"latent": {"mean": (16, 7, 7), "scale": (16, 7, 7)}, "pose": {"mean": (6,), "scale": (6,)}},
    priors={"latent": "standard-normal", "pose": "learned"},
    density="low-rank-normal",
    density_parameters={"mean": (3, 64, 48), "factor": (25, 3, 64, 48), "variance": (3, 64, 48)},
    scoring_parameters={},
    operations=tuple(OPERATIONS),
    score_samples=16,
    draw_samples=8,
    run_id="a run, “quoted”",
    run_digest="ff00",
    data="toy",
    warp=WarpSpec("affine", (0.0,) * 5 + (0.25,), ((0.1, 0.0, 0.5, 0.0, 1.0, 0.0),) * 6, (1 / 3,) * 6),
)
ALONE = replace(
    SPEC, latents={}, posteriors={}, priors={}, warp=None, operations=("sample", "draw", "condition", "score")
)


@pytest.mark.parametrize("spec", [SPEC, ALONE])
def test_a_spec_survives_the_parameters(spec):
    parameters = spec.to_parameters()
    assert all(isinstance(value, str) for value in parameters.values())
    assert ModelSpec.from_parameters(parameters) == spec
    assert ModelSpec.from_parameters({**parameters, "execution_mode": "0"}) == spec


def test_a_spec_without_a_warp_is_written_as_it_was_before_there_were_any():
    plain = replace(SPEC, warp=None)
    assert "warp" not in plain.to_parameters()
    assert ModelSpec.from_parameters(plain.to_parameters()) == plain


@pytest.mark.parametrize("name", [field.name for field in fields(SPEC) if field.name != "warp"])
def test_a_missing_parameter_is_named(name):
    parameters = SPEC.to_parameters()
    del parameters[name]
    with pytest.raises(InvalidArgument, match=name):
        ModelSpec.from_parameters(parameters)


@pytest.mark.parametrize("malformed", [{"operations": "5"}, {"image_shape": "five"}, {"density_parameters": "[]"}])
def test_text_that_is_no_json_or_of_another_kind_is_refused(malformed):
    with pytest.raises(InvalidArgument, match=r"malformed: .*; export it again"):
        ModelSpec.from_parameters({**SPEC.to_parameters(), **malformed})


@pytest.mark.parametrize(("name", "ours"), [("contract_version", 2), ("noise_version", 2)])
def test_another_version_is_refused_with_both(name, ours):
    with pytest.raises(InvalidArgument, match=rf"{name}: the model has 1, this version of Covae speaks {ours}; export"):
        ModelSpec.from_parameters({**SPEC.to_parameters(), name: "1"})


def test_a_repository_of_contract_1_is_refused_with_what_to_do():
    first = {"family": '"sos-vae"', "latent_shape": "[4]", "rank": "2", "contract_version": "1"}
    with pytest.raises(InvalidArgument, match=r"contract_version: the model has 1, .* export the model again"):
        ModelSpec.from_parameters(first)


@pytest.mark.parametrize("spec", [SPEC, ALONE], ids=["latents", "none"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_tensor_has_a_known_dtype_and_size(name, spec):
    if name not in spec.operations:
        pytest.skip("the model cannot do it")
    for tensor in (*OPERATIONS[name].inputs(spec), *OPERATIONS[name].outputs(spec)):
        assert tensor.dtype in NUMPY_DTYPES
        assert tensor.row_bytes > 0
    assert OPERATIONS[name].inputs(spec), "Triton takes no model without an input"


def test_row_bytes_count_the_factor():
    sizes = {tensor.name: tensor.row_bytes for tensor in OPERATIONS["decode"].outputs(SPEC)}
    assert sizes["factor"] == 25 * 3 * 64 * 48 * 4


def test_operations_name_their_triton_models():
    assert served_name("digits", "score") == "digits_score"
    assert split_served_name("my_digits_score") == ("my_digits", "score")
    assert split_served_name("digits_paint") is None
    assert split_served_name("_score") is None


@pytest.mark.parametrize("name", ["score", "with space", "under_score"])
def test_an_operation_needs_a_name_of_its_own(name):
    entry = OPERATIONS["score"]
    with pytest.raises(InvalidArgument, match=f"operation: found '{name}'; expected a new word"):
        register(Operation(name, "", entry.needs, entry.inputs, entry.outputs, entry.run))

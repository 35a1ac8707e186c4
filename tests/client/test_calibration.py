"""P-values: exact under exchangeability, two-sided, and what they are made of against plain counting."""

import numpy as np
import pytest

from covae_core.calibration import (
    PARTS,
    Calibration,
    calibrate_on,
    code_lengths,
    false_discoveries,
    lag1_of_each,
    parts_of,
)
from covae_core.errors import InvalidArgument
from covae_core.surprise import spots


def drawn(random, count):
    """Parts of images that are like each other: correlated, skewed."""
    common = random.standard_normal(count)
    values = (np.exp(0.3 * (common + random.standard_normal(count))) for _ in PARTS)
    return dict(zip(PARTS, values, strict=True))


@pytest.fixture(scope="module")
def calibration():
    random = np.random.default_rng(0)
    return calibrate_on("toy", "0123", drawn(random, 100), drawn(random, 199))


def test_the_false_alarm_rate_is_the_nominal_one_on_average_over_calibrations():
    random = np.random.default_rng(1)
    alarms = np.zeros(3)
    for _ in range(200):
        found = calibrate_on("toy", "0123", drawn(random, 30), drawn(random, 99))
        p_values = found.judge(drawn(random, 100)).p_value
        alarms += [np.mean(p_values <= rate) for rate in (0.01, 0.05, 0.1)]
    # 200 calibrations of 99: the mean alarm rate is known to sqrt(α(1 − α)(1/99 + 1/100)/200); three of those.
    nominal = np.array([0.01, 0.05, 0.1])
    error = np.sqrt(nominal * (1 - nominal) * (1 / 99 + 1 / 100) / 200)
    assert (np.abs(alarms / 200 - nominal) < 3 * error).all()


def test_p_values_are_ranks(calibration):
    random = np.random.default_rng(2)
    new = drawn(random, 50)
    statistic = calibration._statistic(calibration._units(new))
    counted = [(1 + sum(np.array(calibration.statistics) >= value)) / 200 for value in statistic]
    np.testing.assert_allclose(calibration.judge(new).p_value, counted)
    assert calibration.judge(new).p_value.min() >= 1 / 200


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_part_far_from_the_others_is_odd_either_way_and_is_named(calibration, name, sign):
    usual = {part: np.array([calibration.centre[index]]) for index, part in enumerate(calibration.parts)}
    index = calibration.parts.index(name)
    spread = calibration.above[index] if sign > 0 else calibration.below[index]
    found = calibration.judge({**usual, name: usual[name] + sign * 20 * spread})
    assert (found.p_value[0], found.part[0]) == (1 / 200, name)
    assert calibration.judge(usual).p_value[0] > 0.9


def test_direction_follows_the_likelihood(calibration):
    usual = {part: np.array([calibration.centre[index]]) for index, part in enumerate(calibration.parts)}
    likelier = {**usual, "residual": usual["residual"] - 5}
    unlikelier = {**usual, "residual": usual["residual"] + 5}
    assert calibration.judge(likelier).too_likely[0]
    assert not calibration.judge(unlikelier).too_likely[0]


def test_a_calibration_survives_its_text(calibration):
    import json

    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    assert again == calibration
    new = drawn(np.random.default_rng(3), 20)
    np.testing.assert_array_equal(again.judge(new).p_value, calibration.judge(new).p_value)


def test_a_part_that_never_varies_says_nothing():
    random = np.random.default_rng(4)
    first, scored = drawn(random, 50), drawn(random, 50)
    first["latent"][:], scored["latent"][:] = 0, 0
    found = calibrate_on("toy", "0123", first, scored)
    assert "latent" not in found.parts
    assert np.isfinite(found.judge(drawn(random, 5)).p_value).all()


def test_too_few_images_are_refused():
    random = np.random.default_rng(5)
    with pytest.raises(InvalidArgument, match="found 9 and 50 images; expected 10"):
        calibrate_on("toy", "0123", drawn(random, 9), drawn(random, 50))


def test_benjamini_hochberg_by_its_definition():
    p_values = np.array([0.001, 0.5, 0.02, np.nan, 0.9, 0.029])
    # Five known: the limits at a rate of 0.05 are 0.01, 0.02, 0.03, …; the third smallest, 0.029, is the last below.
    np.testing.assert_array_equal(false_discoveries(p_values, 0.05), [True, False, True, False, False, True])
    assert not false_discoveries(np.full(10, 0.06), 0.05).any()


def test_a_flat_image_has_a_short_code_and_noise_a_long_one():
    noise = np.random.default_rng(6).integers(0, 256, (1, 32, 32, 1), dtype=np.uint8)
    flat, random = code_lengths(np.concatenate([np.full_like(noise, 77), noise]))
    assert flat < 20
    assert random > 0.8 * 1024 * np.log(256)
    # A code that is a function of the image's content, not of a library's version.
    ramp = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    assert code_lengths(ramp)[0] == pytest.approx(3 * np.log(256) + _entropy_nats([1, 7 * 8, 7]), abs=1e-9)


def _entropy_nats(counts):
    counts = np.array(counts)
    return -(counts * np.log(counts / counts.sum())).sum()


def test_the_texture_of_white_noise_is_none_and_of_a_smooth_map_near_one():
    random = np.random.default_rng(7)
    noise = random.standard_normal((1, 1, 64, 64))
    smooth = np.ones((1, 1, 64, 64))
    white, even, nothing = lag1_of_each(np.concatenate([noise, smooth, 0 * smooth]))
    assert abs(white) < 0.05
    assert even == pytest.approx(63 / 64)
    assert nothing == 0


def test_parts_do_not_depend_on_the_other_images():
    random = np.random.default_rng(8)
    images = random.integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    maps = random.standard_normal((5, 3, 6, 6))
    numbers = random.standard_normal((3, 5))
    whole = parts_of(images, maps, *numbers)
    alone = parts_of(images[2:3], maps[2:3], *numbers[:, 2:3])
    for name in PARTS:
        assert whole[name][2] == alone[name][0]


def test_a_spot_is_what_nine_neighbours_add_up_to():
    maps = np.zeros((1, 1, 8, 8))
    maps[0, 0, 2:5, 3:6] = -2.0
    assert spots(maps)[0] == pytest.approx(9 * 2 / 3)
    # Of white noise, the largest of 36 sums of sd 1 each.
    noise = np.random.default_rng(9).standard_normal((2000, 1, 1, 1)) * np.ones((1, 1, 1, 1))
    np.testing.assert_allclose(spots(noise), np.abs(noise[:, 0, 0, 0]) / 3)

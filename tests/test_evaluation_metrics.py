"""Scores of depth, normals and segmentations: cases worked out by hand, other libraries, and slow definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import contingency_table, mean_squared_error
from skimage.morphology import dilation, erosion
from skimage.segmentation import find_boundaries

from evaluation.metrics import Confusion, average_over_images, boundary_band, depth_scores, normal_scores

ALL = np.ones((1, 4), bool)


def row(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


def test_depth_by_hand():
    valid = np.array([[True, True, True, False]])
    actual = depth_scores(row(1.2, 2.6, 2, np.nan), row(1, 2, 4, 0), valid, aligned=False)
    assert actual == pytest.approx(
        {"rmse": math.sqrt((0.2**2 + 0.6**2 + 2**2) / 3), "d1": 1 / 3, "d2": 2 / 3, "d3": 2 / 3}
    )


def test_depth_ratios_are_below_the_thresholds_both_ways():
    actual = depth_scores(row(1.25, 1, 1.2, 1), row(1, 1.25, 1, 1.2), ALL, aligned=False)
    assert (actual["d1"], actual["d2"]) == (0.5, 1)
    actual = depth_scores(row(0, -1, -2, 1), row(1, 1, 2, 1), ALL, aligned=False)  # not positive: outside
    assert (actual["d1"], actual["d3"]) == (0.25, 0.25)


def test_depth_against_another_library():
    random = np.random.default_rng(0)
    prediction, target = random.uniform(0.5, 9, (2, 30, 40))
    actual = depth_scores(prediction, target, np.ones((30, 40), bool), aligned=False)
    assert actual["rmse"] == pytest.approx(math.sqrt(mean_squared_error(prediction, target)))
    ratio = np.exp(np.abs(np.log(prediction) - np.log(target)))
    assert [actual["d1"], actual["d2"], actual["d3"]] == [float((ratio < 1.25**k).mean()) for k in (1, 2, 3)]


def test_depth_is_aligned_by_scale_and_shift_of_the_valid_pixels():
    target = row(1, 2, 4, 7)
    actual = depth_scores((target - 3) / -2, target, ALL, aligned=True)
    assert actual == pytest.approx({"rmse": 0, "d1": 1, "d2": 1, "d3": 1}, abs=1e-12)

    random = np.random.default_rng(1)
    prediction, target = random.uniform(0.5, 9, (2, 20, 30))
    valid = random.random((20, 30)) < 0.7
    fitted = np.polyval(np.polyfit(prediction[valid], target[valid], 1), prediction)
    expected = depth_scores(fitted, target, valid, aligned=False)
    assert depth_scores(prediction, target, valid, aligned=True) == pytest.approx(expected)


def test_depth_that_is_aligned_is_not_clipped():
    # least squares: 1.35 p - 0.525, that is -0.525, 0.825, 2.175 and 3.525
    actual = depth_scores(row(0, 1, 2, 3), row(0.5, 0.25, 0.25, 5), ALL, aligned=True)
    rmse = math.sqrt((1.025**2 + 0.575**2 + 1.925**2 + 1.475**2) / 4)
    assert actual == pytest.approx({"rmse": rmse, "d1": 0, "d2": 0.25, "d3": 0.25})


def test_depth_that_is_constant_stays_as_it_is():
    prediction, target = row(2, 2, 2, 2), row(1, 2, 3, 4)
    expected = depth_scores(prediction, target, ALL, aligned=False)
    assert depth_scores(prediction, target, ALL, aligned=True) == expected
    assert expected["rmse"] == pytest.approx(math.sqrt(1.5))


def rotated(*degrees: float) -> np.ndarray:
    """Return one row of normals, turned from (0, 0, 1) by so many degrees about the x axis."""
    angle = np.radians(degrees)
    return np.stack([np.zeros_like(angle), np.sin(angle), np.cos(angle)], -1)[None]


def test_normals_by_hand():
    target, valid = rotated(0, 0, 0, 0, 0), np.array([[True, True, True, True, False]])
    actual = normal_scores(3 * rotated(0, 12, 25, 35, 90), target, valid)
    rmse = math.sqrt((12**2 + 25**2 + 35**2) / 4)
    assert actual == pytest.approx({"rmse": rmse, "11.25": 0.25, "22.5": 0.5, "30": 0.75})


@pytest.mark.parametrize("degrees", [0, 1e-7, 0.5, 11.24, 90, 179.9, 180])
def test_normals_at_every_angle(degrees):
    actual = normal_scores(rotated(degrees), rotated(0), np.ones((1, 1), bool))
    assert actual["rmse"] == pytest.approx(degrees, rel=1e-9, abs=1e-13)
    assert actual["11.25"] == (degrees < 11.25)


def test_normals_that_are_zero_are_at_right_angles():
    assert normal_scores(np.zeros((1, 1, 3)), rotated(0), np.ones((1, 1), bool))["rmse"] == 90
    assert normal_scores(rotated(0), np.zeros((1, 1, 3)), np.ones((1, 1), bool))["rmse"] == 90


def test_normals_against_another_library():
    random = np.random.default_rng(0)
    prediction, target = random.standard_normal((2, 20, 30, 3))
    valid = random.random((20, 30)) < 0.7
    cosine = torch.cosine_similarity(torch.from_numpy(prediction), torch.from_numpy(target), dim=-1)
    angle = torch.rad2deg(torch.acos(cosine))[torch.from_numpy(valid)]
    actual = normal_scores(prediction, target, valid)
    assert actual["rmse"] == pytest.approx(float(angle.square().mean().sqrt()))
    assert actual["30"] == pytest.approx(float((angle < 30).double().mean()))


def test_images_count_the_same_and_those_without_valid_pixels_are_left_out():
    none = np.zeros((1, 4), bool)
    images = [
        depth_scores(row(2, 2, 2, 2), row(1, 1, 1, 1), ALL, aligned=False),
        depth_scores(row(1, 2, 2, 2), row(1, 0, 0, 0), np.array([[True, False, False, False]]), aligned=False),
        depth_scores(row(2, 2, 2, 2), row(0, 0, 0, 0), none, aligned=True),
    ]
    assert images[2] == {}
    assert average_over_images(images) == {"rmse": 0.5, "d1": 0.5, "d2": 0.5, "d3": 0.5}
    assert normal_scores(np.ones((1, 4, 3)), np.ones((1, 4, 3)), none) == {}
    assert average_over_images([{}, {}]) == average_over_images([]) == {}


def test_a_prediction_that_is_not_a_number_shows():
    broken = depth_scores(row(np.nan, 1, 1, 1), row(1, 1, 1, 1), ALL, aligned=False)
    means = average_over_images([broken])
    assert math.isnan(means["rmse"])
    assert means["d1"] == 0.75


def test_confusion_by_hand():
    confusion = Confusion(4)
    confusion.add(np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 1, 1, 255, 0]))
    np.testing.assert_array_equal(confusion.counts, [[1, 0, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert confusion.pixel_accuracy() == 3 / 5
    # class 2 was predicted but never occurs: 0; class 3 neither: left out
    np.testing.assert_allclose(confusion.iou(), [1 / 3, 2 / 3, 0, np.nan])
    assert confusion.mean_iou() == pytest.approx(1 / 3)


def test_confusion_against_another_library():
    random = np.random.default_rng(0)
    label, prediction = random.integers(0, 5, (2, 3, 20, 30), np.uint8)
    label[random.random(label.shape) < 0.2] = 255
    where = random.random(label.shape) < 0.5
    confusion, banded = Confusion(5), Confusion(5)
    for image in zip(prediction, label):
        confusion.add(*image)
    banded.add(prediction, label, where)
    for actual, kept in (confusion, label != 255), (banded, where & (label != 255)):
        table = contingency_table(label[kept], prediction[kept]).toarray()
        np.testing.assert_array_equal(actual.counts, table)
        masks = [(label[kept] == k, prediction[kept] == k) for k in range(5)]
        np.testing.assert_allclose(actual.iou(), [(a & b).sum() / (a | b).sum() for a, b in masks])
        assert actual.pixel_accuracy() == (label[kept] == prediction[kept]).mean()
        assert actual.mean_iou() == pytest.approx(actual.iou().mean())


def test_an_ignored_class_is_not_scored():
    confusion = Confusion(3, ignore=0)
    confusion.add(np.array([0, 1, 0, 2]), np.array([1, 1, 0, 2]))
    np.testing.assert_allclose(confusion.iou(), [np.nan, 0.5, 1])
    assert confusion.mean_iou() == 0.75
    assert confusion.pixel_accuracy() == 2 / 3


def test_confusion_of_nothing_is_not_a_number():
    confusion = Confusion(2)
    confusion.add(np.array([1]), np.array([255]))
    assert math.isnan(confusion.pixel_accuracy())
    assert math.isnan(confusion.mean_iou())
    assert np.isnan(confusion.iou()).all()


def test_confusion_refuses_what_is_no_class():
    confusion = Confusion(2)
    with pytest.raises(ValueError, match=r"label .*\b7\b.*ignore=255"):
        confusion.add(np.array([1, 1]), np.array([1, 7]))
    with pytest.raises(ValueError, match=r"prediction .*-1"):
        confusion.add(np.array([-1]), np.array([1]))
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        confusion.add(np.array([1]), np.array([1, 1]))
    with pytest.raises(ValueError, match="classes=0"):
        Confusion(0)
    assert confusion.counts.sum() == 0
    confusion.add(np.array([7, 1]), np.array([255, 1]))  # what is ignored may be predicted as anything
    assert confusion.counts.sum() == 1


def test_boundary_band_by_hand():
    label = np.zeros((5, 7), np.uint8)
    label[0, 0] = 3
    expected = np.zeros((5, 7), bool)
    expected[:3, :3] = True
    np.testing.assert_array_equal(boundary_band(label, 2), expected)
    assert not boundary_band(np.full((4, 4), 255, np.uint8)).any()
    assert not boundary_band(label, 0).any()
    assert boundary_band(label, 100).all()
    with pytest.raises(ValueError, match="width=-1"):
        boundary_band(label, -1)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_boundary_band_against_the_definition(width, dtype):
    random = np.random.default_rng(width)
    label = np.kron(random.integers(0, 4, (3, 4)), np.ones((5, 7))).astype(dtype)
    label[random.integers(15), random.integers(28)] = 255
    expected = np.zeros(label.shape, bool)
    for i, j in np.ndindex(label.shape):
        window = label[max(i - width, 0) : i + width + 1, max(j - width, 0) : j + width + 1]
        expected[i, j] = (window != label[i, j]).any()
    np.testing.assert_array_equal(boundary_band(label, width), expected)


def test_boundary_band_against_another_library():
    label = np.kron(np.random.default_rng(0).integers(0, 3, (6, 5)), np.ones((8, 9))).astype(np.uint8)
    np.testing.assert_array_equal(boundary_band(label, 1), find_boundaries(label, connectivity=2, mode="thick"))
    square = np.ones((9, 9), np.uint8)
    np.testing.assert_array_equal(boundary_band(label), dilation(label, square) != erosion(label, square))

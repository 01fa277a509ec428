"""Pictures of features: PCA colours, bilinear interpolation, the attention picture, panels."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from anyup_core import figure, visualize


def features(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_basis_is_the_principal_components():
    scales = np.array([1.0, 9.0, 0.1, 5.0, 3.0])
    basis = visualize.pca_basis([features(40, 30, 5) * scales + 7])
    np.testing.assert_allclose(basis.mean, np.full(5, 7), atol=0.5)
    np.testing.assert_allclose(np.abs(basis.components), np.eye(5)[[1, 3, 4]], atol=0.1)
    assert (basis.components.max(1) > 0.9).all()  # the largest entry is positive


def test_signs_do_not_depend_on_the_order_of_positions():
    maps = features(16, 16, 24)
    one, other = visualize.pca_basis([maps]), visualize.pca_basis([maps[::-1, ::-1]])
    np.testing.assert_allclose(one.components, other.components, atol=1e-4)


def test_projection_in_blocks_equals_projection_at_once(monkeypatch):
    maps = features(13, 7, 10)
    basis = visualize.pca_basis([maps])
    whole = basis.project(maps)
    monkeypatch.setattr(visualize, "BLOCK", 2 * 7 * 10)
    np.testing.assert_allclose(basis.project(maps), whole, rtol=1e-6)
    np.testing.assert_allclose(whole, (maps - basis.mean) @ basis.components.T, atol=1e-5)
    with pytest.raises(ValueError, match=r"for features \(h, w, 10\); got \(4, 4, 9\)"):
        basis.project(maps[:4, :4, :9])


def test_colours_mean_the_same_in_every_panel():
    low = features(8, 12, 20)
    high = visualize.bilinear(low, (32, 48))
    small, nearest, large = visualize.pca_colors(low, low.repeat(4, 0).repeat(4, 1), high)
    assert [picture.shape for picture in (small, nearest, large)] == [(8, 12, 3), (32, 48, 3), (32, 48, 3)]
    assert small.dtype == np.uint8
    np.testing.assert_array_equal(small.repeat(4, 0).repeat(4, 1), nearest)
    assert large.std() < small.std()  # interpolation narrows the range, and the picture shows it
    assert small.min() == 0
    assert small.max() == 255


def test_a_given_basis_is_kept():
    low, other = features(8, 8, 6), features(8, 8, 6, seed=1) * np.arange(6)
    alone = visualize.pca_colors(low)[0]
    np.testing.assert_array_equal(visualize.pca_colors(low, low[:2], basis=visualize.pca_basis([low]))[0], alone)
    assert (visualize.pca_colors(low, other)[0] != alone).any()


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_than_three_channels(channels):
    picture = visualize.pca_colors(features(6, 6, channels))[0]
    assert (picture[..., channels:] == 128).all()
    assert (picture[..., :channels].reshape(-1, channels).std(0) > 0).all()


@pytest.mark.parametrize("value", [0.0, 1e3, -1 / 3])
def test_constant_features_are_gray(value):
    assert (visualize.pca_colors(np.full((5, 6, 7), value, np.float32))[0] == 128).all()


def test_maps_that_share_no_basis_are_refused():
    for maps in ([], [features(4, 4, 3), features(4, 4, 2)], [features(4, 4)], [features(0, 4, 3)]):
        with pytest.raises(ValueError, match="same number of channels"):
            visualize.pca_basis(maps)
    with pytest.raises(ValueError, match="not finite"):
        visualize.pca_basis([np.full((4, 4, 3), np.nan)])


@pytest.mark.parametrize("size", [(20, 30), (7, 5), (3, 4), (1, 9)])
def test_bilinear_has_half_pixel_centres(size):
    maps = features(5, 6, 3)
    expected = F.interpolate(torch.from_numpy(maps).permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(visualize.bilinear(maps, size), expected[0].permute(1, 2, 0), atol=1e-5)
    assert visualize.bilinear(maps, size).dtype == np.float32


def test_bilinear_of_a_single_cell():
    np.testing.assert_array_equal(visualize.bilinear(np.ones((1, 1, 2), np.float32), (3, 4)), np.ones((3, 4, 2)))


@pytest.mark.parametrize(
    ("oklab", "srgb"),
    [
        ((1, 0, 0), (1, 1, 1)),
        ((0, 0, 0), (0, 0, 0)),
        ((0.62796, 0.22486, 0.12585), (1, 0, 0)),
        ((0.86644, -0.23389, 0.17950), (0, 1, 0)),
        ((0.45201, -0.03246, -0.31153), (0, 0, 1)),
        ((0.59987, 0, 0), (0.50196, 0.50196, 0.50196)),  # the gray of 8-bit 128
    ],
)
def test_known_oklab_colours(oklab, srgb):
    np.testing.assert_allclose(visualize.oklab_to_srgb(np.array(oklab)), srgb, atol=2e-3)


def test_the_colour_wheel():
    wheel = visualize.color_wheel(8, 12)
    lightness, a, b = np.moveaxis(wheel, -1, 0)
    assert wheel.shape == (8, 12, 3)
    np.testing.assert_allclose(lightness, lightness[0, 0])
    np.testing.assert_allclose(wheel[:, :, 1:], -wheel[::-1, ::-1, 1:], atol=1e-7)  # opposite cells, opposite hues
    assert (a[:, -1] > 0).all()  # to the right is red
    assert (b[0] > 0).all()  # up is yellow
    assert len(np.unique(wheel.reshape(-1, 3), axis=0)) == 96
    unclipped = (wheel.reshape(-1, 3) @ visualize.OKLAB_TO_LMS.T) ** 3 @ visualize.LMS_TO_RGB.T
    assert unclipped.min() >= 0
    assert unclipped.max() <= 1
    np.testing.assert_allclose(np.hypot(*visualize.color_wheel(1001, 1001)[0, 0, 1:]), visualize.CHROMA, rtol=2e-3)


def test_the_attention_picture_of_an_upsampler_that_copies_cells():
    picture = visualize.attention_picture(lambda colours: colours.repeat(5, 0).repeat(5, 1), 4, 6)
    assert picture.shape == (20, 30, 3)
    np.testing.assert_array_equal(picture[::5, ::5], visualize.oklab_picture(visualize.color_wheel(4, 6)))


def test_panels_are_drawn_into_one_picture(tmp_path):
    path = tmp_path / "panels.png"
    path.write_bytes(b"an older picture")
    colours = [np.full((h, w, 3), c, np.uint8) for h, w, c in ((64, 96, 10), (4, 6, 90), (64, 96, 170), (2, 3, 250))]
    panels = [(f"$panel\\frac_{i}$ \udcff\nline", picture) for i, picture in enumerate(colours)]
    figure.draw_panels(path, panels, columns=2, title="A $title$", subtitle="weights: \udcff")
    with Image.open(path) as image:
        drawn = np.asarray(image.convert("L"))
    areas = [np.count_nonzero(drawn == c) for c in (10, 90, 170, 250)]
    assert min(areas) > 0.95 * max(areas) > 0  # equal panels, whatever the size of the picture
    assert [file.name for file in tmp_path.iterdir()] == ["panels.png"]


def test_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "anyup-jax\[viz\]"'):
        figure.draw_panels(tmp_path / "p.png", [("a", np.zeros((2, 2, 3), np.uint8))])

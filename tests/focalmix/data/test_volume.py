"""Grids against SimpleITK, resampling, patches."""

import itertools
import math

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels.focalmix.data.volume import AIR, Volume, cut_patch, resample


def volume_of(voxels, spacing=(1.0,) * 3, origin=(0.0,) * 3, direction=None) -> Volume:
    direction = np.eye(3) if direction is None else direction
    voxels = np.asarray(voxels, dtype=np.int16)
    return Volume(voxels, spacing, origin, tuple(map(tuple, direction.tolist())))


def image_of(volume) -> sitk.Image:
    image = sitk.GetImageFromArray(volume.voxels)
    image.SetSpacing(volume.spacing[::-1])
    image.SetOrigin(volume.origin)
    image.SetDirection(np.ravel(volume.direction).tolist())
    return image


def stored_as(volume, code) -> Volume:
    """The same scan with its axes along ``code``, as LSA, whatever they were."""
    image = sitk.DICOMOrient(image_of(volume), code)
    return volume_of(
        sitk.GetArrayFromImage(image),
        image.GetSpacing()[::-1],
        image.GetOrigin(),
        np.array(image.GetDirection()).reshape(3, 3),
    )


spacings = st.tuples(*[st.floats(0.4, 3.0)] * 3)


@st.composite
def volumes(draw) -> Volume:
    """Noise with any spacing, origin and orthonormal direction, mirrored ones included."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    direction = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    voxels = rng.integers(-1000, 1000, size=rng.integers(1, 9, size=3))
    return volume_of(voxels, draw(spacings), tuple(rng.uniform(-500, 500, 3)), direction)


class TestGeometry:
    @given(volumes(), spacings)
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_points_map_as_in_simpleitk_and_back(self, volume, spacing):
        volume = resample(volume, spacing)
        image = image_of(volume)
        index = np.random.default_rng(0).uniform(-5, 20, size=(4, 3))
        world = np.array(
            [image.TransformContinuousIndexToPhysicalPoint(point[::-1].tolist()) for point in index]
        )
        np.testing.assert_allclose(volume.to_world(index + 0.5), world, atol=1e-9)
        np.testing.assert_allclose(volume.from_world(world), index + 0.5, atol=1e-9)

    @given(volumes(), spacings)
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_grid_begins_at_the_outer_corner_and_covers_the_scan(self, volume, spacing):
        new = resample(volume, spacing)
        low, high = new.from_world(volume.to_world([np.zeros(3), volume.voxels.shape]))
        np.testing.assert_allclose(low, 0, atol=1e-9)
        beyond = new.voxels.shape - high
        assert (beyond > -1e-5).all()
        assert ((beyond < 1) | (np.array(new.voxels.shape) == 1)).all()

    def test_boxes_are_cubes_of_the_diameter_in_voxels(self):
        volume = volume_of(np.zeros((10, 10, 10)), (2.0, 1.0, 1.0), (5.0, 6.0, 7.0))
        boxes = volume.boxes(np.array([[8.0, 8.0, 11.0, 4.0], [8.0, 8.0, 11.0, -1.0]]))
        assert boxes.dtype == np.float32
        assert boxes[0].tolist() == [1.5, 0.5, 1.5, 3.5, 4.5, 5.5]
        assert boxes[1].tolist() == [0.0, -2.5, -1.5, 5.0, 7.5, 8.5]
        assert volume.boxes(np.empty((0, 4))).shape == (0, 6)


class TestCutPatch:
    @pytest.mark.parametrize("corner", [(0, 0, 0), (-3, 2, 4), (5, -9, 1), (99, 0, 0), (0, -99, 0)])
    @pytest.mark.parametrize("flipped", [(False,) * 3, (True, False, True)])
    def test_is_the_scan_with_air_around(self, corner, flipped):
        voxels = np.random.default_rng(0).integers(-1000, 1000, (6, 7, 8)).astype(np.int16)
        patch = cut_patch(voxels, corner, (5, 4, 9), flipped)
        begin = np.add(corner, 110)
        padded = np.pad(voxels, 110, constant_values=AIR)
        expected = padded[tuple(map(slice, begin, begin + np.array((5, 4, 9))))]
        np.testing.assert_array_equal(patch, np.flip(expected, np.flatnonzero(flipped)))
        assert patch.dtype == np.int16 and patch.flags.c_contiguous

    @pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
    @pytest.mark.parametrize("corner", [(1, 2, 3), (-2, 3, 4)])
    def test_a_cube_may_be_turned(self, axes, corner):
        voxels = np.random.default_rng(0).integers(-1000, 1000, (6, 7, 8)).astype(np.int16)
        patch = cut_patch(voxels, corner, (5, 5, 5), (True, False, True), axes)
        expected = cut_patch(voxels, corner, (5, 5, 5)).transpose(axes)[::-1, :, ::-1]
        np.testing.assert_array_equal(patch, expected)
        assert patch.flags.c_contiguous


class TestResample:
    def test_same_spacing_keeps_every_voxel(self):
        voxels = np.random.default_rng(0).integers(-1000, 2000, size=(5, 6, 7))
        volume = resample(volume_of(voxels, (2.5, 0.7, 0.8)), (2.5, 0.7, 0.8))
        np.testing.assert_array_equal(volume.voxels, voxels)
        assert volume.voxels.dtype == np.int16

    @given(volumes(), st.tuples(*[st.floats(0.3, 1.0)] * 3))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_finer_spacing_is_simpleitk_linear_interpolation(self, stored, fractions):
        spacing = tuple(np.multiply(stored.spacing, fractions).tolist())
        volume, image = resample(stored, spacing), image_of(stored)
        expected = sitk.Resample(
            sitk.Cast(sitk.ZeroFluxNeumannPad(image, (1, 1, 1), (1, 1, 1)), sitk.sitkFloat64),
            volume.voxels.shape[::-1],
            sitk.Transform(),
            sitk.sitkLinear,
            volume.origin,
            spacing[::-1],
            image.GetDirection(),
            math.nan,
        )
        np.testing.assert_allclose(volume.voxels, sitk.GetArrayViewFromImage(expected), atol=0.51)

    @pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
    def test_coarser_spacing_averages_instead_of_skipping(self, axes):
        stripes = np.where(np.arange(48) % 2, 900, -900) + np.zeros((48, 48, 1))
        volume = resample(volume_of(stripes.transpose(axes)), (4.3, 4.3, 4.3))
        inside = tuple(slice(1, -1) if n > 1 else slice(None) for n in volume.voxels.shape)
        assert np.abs(volume.voxels[inside]).max() < 60

    def test_coarser_spacing_keeps_constants_and_slopes(self):
        ramp = np.arange(60)[:, None, None] * 30 - 900 + np.zeros((60, 4, 4))
        volume = resample(volume_of(ramp), (2.5, 2.0, 2.0))
        centers = volume.to_world(np.array([[i + 0.5, 0.5, 0.5] for i in range(24)]))[:, 2]
        np.testing.assert_allclose(volume.voxels[2:-2, 0, 0], centers[2:-2] * 30 - 900, atol=6)
        assert (resample(volume_of(np.full((9, 9, 9), 77)), (2.3, 1.7, 4.0)).voxels == 77).all()

    def test_padding_below_air_becomes_air_before_it_is_mixed(self):
        voxels = np.full((4, 4, 4), -3000)
        voxels[:, :, 2:] = 0
        volume = resample(volume_of(voxels), (1.0, 1.0, 0.5))
        assert volume.voxels.min() == AIR
        assert volume.voxels[0, 0].tolist() == [AIR, AIR, AIR, -768, -256, 0, 0, 0]

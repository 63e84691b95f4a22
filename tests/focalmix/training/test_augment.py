"""Contrast, brightness, blur and noise of the images that the student sees."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from fmkernels.focalmix.config import Config
from fmkernels.focalmix.training.augment import augment, augmented, blur

OFF = Config(window=(-1000.0, 1000.0))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return 0.3 + 0.2 * torch.rand(3, 1, 12, 10, 14, generator=generator)


def test_without_options_the_model_is_called_as_it_is():
    model = torch.nn.Identity()
    assert augmented(model, OFF, (0, 0)) is model


def test_the_key_decides(images):
    model = augmented(torch.nn.Identity(), replace(OFF, noise=50.0), (1, 2))
    assert torch.equal(model(images), model(images))
    other = augmented(torch.nn.Identity(), replace(OFF, noise=50.0), (1, 3))
    assert not torch.equal(model(images), other(images))


def test_contrast_and_brightness_are_one_line_for_each_image(images):
    changed, lines = augment(images, replace(OFF, contrast=0.2), (0,)), []
    for before, after in zip(images.flatten(1), changed.flatten(1), strict=True):
        slope, offset = np.polyfit(before.numpy(), after.numpy(), 1)
        np.testing.assert_allclose(after, slope * before + offset, atol=1e-5)
        assert 0.8 <= slope <= 1.2 and -0.2 <= offset <= 0.2
        lines.append((slope, offset))
    assert len(set(lines)) == 3 and all(abs(slope - 1) > 1e-3 for slope, _ in lines)


def test_noise_is_up_to_its_standard_deviation_in_hu():
    flat = torch.full((40, 1, 16, 16, 16), 0.5)
    deviation = (augment(flat, replace(OFF, noise=100.0), (0,)) - flat).flatten(1).std(1)
    assert deviation.max() <= 0.0515 and deviation.max() > 0.04 and deviation.min() < 0.01


def test_blur_is_gaussian_with_a_strength_for_each_image(images):
    sigma = torch.tensor([0.0, 0.7, 1.5])
    result = blur(images, sigma, reach=5)
    torch.testing.assert_close(result[0], images[0])
    for ours, image, s in zip(result[1:], images[1:], sigma[1:].tolist(), strict=True):
        wanted = ndimage.gaussian_filter(image[0].numpy(), s, mode="nearest", radius=5)
        np.testing.assert_allclose(ours[0], wanted, atol=1e-5)
    blurred = augment(images, replace(OFF, blur=1.5), (0,))
    assert (blurred.flatten(1).std(1) < images.flatten(1).std(1)).all()


def test_the_range_and_the_dtype_stay(images):
    strong = replace(OFF, contrast=1.0, blur=2.0, noise=2000.0)
    for dtype in (torch.float32, torch.bfloat16):
        result = augment(images.to(dtype), strong, (0,))
        assert result.dtype == dtype and result.shape == images.shape
        assert result.min() >= 0 and result.max() <= 1

"""Crop, flip and colours of training images against torch's own padding and torchvision's transforms, sample by sample."""

import colorsys

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional
from torchvision.transforms.v2 import functional as vision

from lipconvert.errors import InvalidParameterError, ShapeError
from lipconvert.training.augment import LUMA, Augmentation, luma, shift_hue
from lipconvert.training.documents import AugmentConfig

WHOLE = {
    "crop": 2,
    "flip": True,
    "brightness": (0.7, 1.3),
    "contrast": (0.6, 1.4),
    "saturation": (0.5, 1.5),
    "hue": 0.3,
}
SHAPES = [(3, 6, 6), (3, 5, 8), (3, 9, 4)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(shape, batch=17, seed=0, **options):
    """(augmentation, images, draws) of a configuration."""
    augmentation = Augmentation(AugmentConfig(**options), shape)
    return augmentation, torch.rand(batch, *shape, generator=seeded(100 + seed)), augmentation.draw(batch, seeded(seed))


def moved(x, draws, k, crop, padding):
    """One sample (C, H, W), padded, cut out and flipped."""
    mode = {"reflect": "reflect", "zeros": "constant"}[padding]
    image = functional.pad(x[k : k + 1], (crop,) * 4, mode=mode)[0] if crop else x[k]
    down, right = int(draws.down[k]), int(draws.right[k])
    image = image[:, down : down + x.shape[2], right : right + x.shape[3]]
    return image.flip(2) if bool(draws.flip[k]) else image


def hue_by_pixel(image, shift):
    """The hue of one sample (3, H, W) moved, pixel by pixel by the standard library, in float64."""
    pixels = []
    for pixel in image.flatten(1).T.tolist():
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        pixels.append(colorsys.hsv_to_rgb((h + shift) % 1.0, s, v))
    return torch.tensor(pixels).T.reshape(image.shape)


def coloured(image, draws, k, hue=hue_by_pixel):
    """One sample, its colours changed by torchvision in the order drawn.

    But for the hue: torchvision's own is computed in float32, whatever the image is.
    """
    changes = (
        (vision.adjust_brightness, draws.brightness),
        (vision.adjust_contrast, draws.contrast),
        (vision.adjust_saturation, draws.saturation),
        (hue, draws.hue),
    )
    for which in draws.order:
        change, numbers = changes[which]
        image = change(image, float(numbers[k]))
    return image


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 4, 7), (2, 6, 3), *SHAPES])
@pytest.mark.parametrize("padding", ["reflect", "zeros"])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_are_padding_and_slicing(shape, padding, flip):
    for crop in range(min(shape[1:])):
        augmentation, x, draws = drawn(shape, crop=crop, padding=padding, flip=flip, seed=crop)
        expected = torch.stack([moved(x, draws, k, crop, padding) for k in range(len(x))])
        # pixels are moved, not computed
        assert torch.equal(augmentation(x, draws), expected)


def test_zeros_may_be_wider_than_the_image():
    augmentation, x, draws = drawn((2, 3, 4), batch=200, crop=6, padding="zeros", flip=True)
    expected = torch.stack([moved(x, draws, k, 6, "zeros") for k in range(len(x))])
    assert torch.equal(augmentation(x, draws), expected)
    assert bool((expected == 0).flatten(1).all(1).any())


def test_every_offset_is_drawn_about_as_often_and_the_extreme_ones_too():
    crop, count = 2, 4000
    draws = Augmentation(AugmentConfig(crop=crop, flip=True), (1, 8, 8)).draw(count, seeded(0))
    for offsets in (draws.down, draws.right):
        found = torch.bincount(offsets, minlength=2 * crop + 1)
        assert len(found) == 2 * crop + 1
        # five standard deviations of a binomial of one fifth
        assert float((found - count / 5).abs().max()) < 5 * (count * 0.2 * 0.8) ** 0.5
    assert abs(int(draws.flip.sum()) - count / 2) < 5 * (count * 0.25) ** 0.5
    # rows, columns and flips know nothing of each other: each pair as often as their product says
    pairs = torch.bincount(5 * draws.down + draws.right, minlength=25)
    assert float((pairs - count / 25).abs().max()) < 5 * (count / 25) ** 0.5


def test_the_corners_of_the_padded_image_are_reached():
    augmentation, x, draws = drawn((1, 4, 4), batch=500, crop=3, flip=False)
    y = augmentation(x, draws)
    padded = functional.pad(x, (3,) * 4, mode="reflect")
    for down, right in ((0, 0), (0, 6), (6, 0), (6, 6)):
        at = ((draws.down == down) & (draws.right == right)).nonzero().flatten()
        assert len(at) > 0
        assert torch.equal(y[at], padded[at, :, down : down + 4, right : right + 4])


def test_no_offset_goes_beyond_the_padding_where_a_uniform_number_is_the_largest():
    # The largest double below 1 times 2c + 1 must still round down to 2c.
    for crop in (1, 2, 4, 100, 1000):
        assert int(torch.tensor(1.0 - 2.0**-53) * (2 * crop + 1)) == 2 * crop


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("only", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_change_is_that_of_torchvision(shape, only):
    augmentation, x, draws = drawn(shape, **{only: WHOLE[only]})
    y = augmentation(x, draws)
    expected = torch.stack([coloured(x[k], draws, k) for k in range(len(x))])
    # a few operations on numbers in [0, 1]; for the hue divisions by a chroma, which is not tiny here
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0.0)
    expected = torch.stack([coloured(x[k], draws, k, vision.adjust_hue) for k in range(len(x))])
    torch.testing.assert_close(y, expected, atol=5e-6, rtol=0.0)  # the hue in float32
    assert float((y - x).abs().amax((1, 2, 3)).min()) > 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_together_is_torchvision_in_the_order_drawn(shape):
    orders = set()
    for seed in range(30):
        augmentation, x, draws = drawn(shape, batch=5, seed=seed, **WHOLE)
        expected = torch.stack([coloured(moved(x, draws, k, 2, "reflect"), draws, k) for k in range(len(x))])
        torch.testing.assert_close(augmentation(x, draws), expected, atol=1e-12, rtol=0.0)  # as above
        orders.add(draws.order)
    assert len(orders) > 10  # of 24
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)


def test_the_order_of_the_colour_changes_matters():
    images, results = torch.rand(1, 3, 4, 4, generator=seeded(0)), []
    augmentation = Augmentation(AugmentConfig(**WHOLE), (3, 4, 4))
    draws = augmentation.draw(1, seeded(1))
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        results.append(augmentation(images, type(draws)(**{**vars(draws), "order": order})))
    assert float((results[0] - results[1]).abs().max()) > 1e-3


def test_colours_of_corner_cases_are_those_of_torchvision():
    # black, white, grey, pure and mixed colours: chroma 0, two equal channels, each channel the largest
    values = torch.tensor([0.0, 0.25, 0.5, 1.0])
    x = torch.cartesian_prod(values, values, values).T.reshape(1, 3, 8, 8)
    for shift in (-0.5, -1 / 3, -0.1, 0.0, 1 / 6, 0.25, 0.5):
        y = shift_hue(x, torch.tensor([shift]))
        torch.testing.assert_close(y[0], hue_by_pixel(x[0], shift), atol=1e-12, rtol=0.0)  # as above
        torch.testing.assert_close(y, vision.adjust_hue(x, shift), atol=5e-6, rtol=0.0)  # float32 there
    augmentation, x, draws = drawn((3, 4, 4), batch=1, **{**WHOLE, "crop": 0, "flip": False})
    for value in (0.0, 0.3, 1.0):
        flat = torch.full_like(x, value)
        expected = coloured(flat[0], draws, 0).unsqueeze(0)
        torch.testing.assert_close(augmentation(flat, draws), expected, atol=1e-12, rtol=0.0)


def test_a_third_of_the_colour_circle_permutes_the_channels():
    x = torch.rand(4, 3, 5, 5, generator=seeded(0))
    # the hue of red becomes that of green: what was red is green now
    torch.testing.assert_close(shift_hue(x, torch.full((4,), 1 / 3)), x.roll(1, 1), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(shift_hue(x, torch.full((4,), -1 / 3)), x.roll(-1, 1), atol=1e-12, rtol=0.0)


def test_luma_is_a_weighted_sum():
    x = torch.rand(4, 3, 5, 6, generator=seeded(0))
    expected = sum(weight * x[:, k : k + 1] for k, weight in enumerate(LUMA))
    torch.testing.assert_close(luma(x), expected, atol=1e-15, rtol=0.0)  # two additions of numbers below 1
    torch.testing.assert_close(luma(x)[0], vision.rgb_to_grayscale(x[0]), atol=1e-15, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_of_a_batch_gets_the_very_same_images(shape, dtype):
    augmentation, x, draws = drawn(shape, batch=13, **WHOLE)
    x = x.to(dtype)
    whole = augmentation(x, draws)
    for world in (1, 2, 3, 5):
        for rank in range(world):
            share = slice(rank, None, world)
            assert torch.equal(augmentation(x[share], draws[share]), whole[share])
    assert torch.equal(augmentation(x[4:5], draws[4:5]), whole[4:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_keep_their_dtype_and_stay_within_0_and_1(dtype):
    extreme = {"brightness": (0.0, 3.0), "contrast": (0.0, 3.0), "saturation": (0.0, 3.0), "hue": 0.5}
    augmentation, x, draws = drawn((3, 5, 6), batch=50, crop=2, flip=True, **extreme)
    given = x.to(dtype)
    before = given.clone()
    y = augmentation(given, draws)
    assert y.dtype == dtype
    assert y.shape == given.shape
    assert 0.0 <= float(y.min()) <= float(y.max()) <= 1.0
    assert torch.equal(given, before)  # the data set itself must not change


def test_draws_lie_within_their_ranges_and_fill_them():
    options = {**WHOLE, "brightness": (0.2, 0.4), "contrast": (1.5, 1.5)}
    draws = Augmentation(AugmentConfig(**options), (3, 8, 8)).draw(2000, seeded(3))
    ranges = {"brightness": (0.2, 0.4), "contrast": (1.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.3, 0.3)}
    for name, (low, high) in ranges.items():
        numbers = getattr(draws, name)
        assert numbers.shape == (2000,)
        assert low <= float(numbers.min()) <= float(numbers.max()) <= high
        # of 2000 uniform numbers the outermost hundredth on either side stays empty with probability e^-20
        assert float(numbers.min()) <= low + 0.01 * (high - low)
        assert float(numbers.max()) >= high - 0.01 * (high - low)
        # the mean of uniform numbers, within five standard deviations
        assert abs(float(numbers.mean()) - (low + high) / 2) <= 5 * (high - low) / (12 * 2000) ** 0.5 + 1e-12
    columns = torch.stack([getattr(draws, name) for name in ("brightness", "saturation", "hue")])
    correlation = torch.corrcoef(columns) - torch.eye(3)
    assert float(correlation.abs().max()) < 5 / 2000**0.5


def test_as_many_numbers_are_drawn_whatever_is_asked_for():
    whole, least = seeded(5), seeded(5)
    all_of_them = Augmentation(AugmentConfig(**WHOLE), (3, 6, 6)).draw(9, whole)
    crop_alone = Augmentation(AugmentConfig(crop=2), (3, 6, 6)).draw(9, least)
    assert torch.equal(whole.get_state(), least.get_state())
    assert torch.equal(all_of_them.down, crop_alone.down)
    assert torch.equal(all_of_them.right, crop_alone.right)
    assert not bool(crop_alone.flip.any())
    assert bool(all_of_them.flip.any())
    assert all_of_them.order == crop_alone.order


def test_draws_are_a_function_of_the_generator():
    first, second, other = (drawn((3, 6, 6), seed=seed, **WHOLE)[2] for seed in (1, 1, 2))
    names = ("down", "right", "flip", "brightness", "contrast", "saturation", "hue")
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)
    assert not any(torch.equal(getattr(first, name), getattr(other, name)) for name in names)


def test_draws_do_not_touch_the_global_generator():
    before = torch.get_rng_state()
    augmentation, x, draws = drawn((3, 6, 6), **WHOLE)
    augmentation(x, draws)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_asked_for_changes_nothing_of_whatever_shape():
    for shape in ((64,), (1, 8, 8), (3, 5, 4), (2, 3, 4, 5)):
        augmentation = Augmentation(AugmentConfig(), shape)
        x = torch.rand(4, *shape, generator=seeded(0))
        assert torch.equal(augmentation(x, augmentation.draw(4, seeded(0))), x)


@pytest.mark.parametrize("shape", [(1, 6, 6), (2, 6, 6), (4, 6, 6)])
@pytest.mark.parametrize("only", ["brightness", "contrast", "saturation", "hue"])
def test_colours_of_what_is_not_rgb_are_refused(shape, only):
    with pytest.raises(ShapeError, match=r"colours") as error:
        Augmentation(AugmentConfig(**{only: WHOLE[only]}), shape)
    assert error.value.actual == shape


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 3, 8, 8)])
@pytest.mark.parametrize("options", [{"crop": 1}, {"flip": True}, {"hue": 0.1}])
def test_what_is_not_images_is_refused(shape, options):
    with pytest.raises(ShapeError, match=r"cropped"):
        Augmentation(AugmentConfig(**options), shape)


@pytest.mark.parametrize("shape", [(1, 4, 9), (3, 9, 4), (1, 4, 4)])
def test_a_crop_that_reflects_more_than_there_is_is_refused(shape):
    Augmentation(AugmentConfig(crop=3), shape)
    Augmentation(AugmentConfig(crop=4, padding="zeros"), shape)
    with pytest.raises(InvalidParameterError, match=r"augment\.crop"):
        Augmentation(AugmentConfig(crop=4), shape)


def test_images_of_another_shape_are_refused():
    augmentation, x, draws = drawn((3, 5, 6), batch=4, crop=1)
    for wrong in (x.transpose(2, 3), x[:, :1], x[0], x.flatten(1)):
        with pytest.raises(ShapeError, match=r"augment"):
            augmentation(wrong, draws)


@pytest.mark.parametrize(
    "options",
    [
        {"brightness": (1.2, 0.8)},
        {"contrast": (1.0, 0.5)},
        {"saturation": (0.5, 0.4)},
        {"brightness": (-0.1, 1.0)},
        {"contrast": (-2.0, -1.0)},
        {"saturation": (float("nan"), 1.0)},
        {"brightness": (1.0, float("inf"))},
        {"hue": 0.6},
        {"hue": -0.1},
        {"hue": float("nan")},
        {"crop": -1},
        {"crop": 1.5},
        {"padding": "circular"},
        {"colour": 1.0},
    ],
)
def test_the_schema_refuses_what_makes_no_sense(options):
    with pytest.raises(ValidationError):
        AugmentConfig(**options)

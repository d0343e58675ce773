"""Buckets: equal token counts, the asked aspect ratios, pictures cut about their centre."""

import math

import numpy as np
import pytest

from unipic_jax.data import buckets


@pytest.mark.parametrize(("area", "multiple", "spread"), [
    (512 * 512, 16, 0.022), (1024 * 1024, 16, 0.005), (1024 * 1024, 32, 0.022),
    (384 * 384, 16, 0.06), (768 * 768, 32, 0.04)])
def test_sizes_have_equal_token_counts(area, multiple, spread):
    sizes = buckets.sizes(area, multiple)
    assert len(sizes) == 7
    assert buckets.spread(sizes) <= spread
    for (w, h), (a, b) in zip(sizes, buckets.RATIOS):
        assert w % multiple == h % multiple == 0
        assert abs(math.log(w / h * b / a)) <= buckets.TOLERANCE
        assert (h, w) in sizes
        assert abs(w * h / area - 1) <= spread


def test_any_area_has_sizes():
    for multiple in (4, 8, 16, 28, 32):
        for side in range(multiple, 40 * multiple, 3 * multiple):
            sizes = buckets.sizes(side * side, multiple)
            assert sizes[0] == (side, side)
            assert len(set(sizes)) == len(sizes)
            assert all(w > 0 and h > 0 and (h, w) in sizes for w, h in sizes)
    assert buckets.sizes(512 * 512, 16, ((1, 1),)) == ((512, 512),)


def test_nearest_is_by_aspect_alone():
    sizes = buckets.sizes(512 * 512, 16)
    pictures = np.array([(w * k, h * k) for k in (1, 7) for w, h in (*buckets.RATIOS, (9, 1))])
    expected = [*range(7), 5]
    assert buckets.nearest(pictures, sizes).tolist() == expected * 2
    assert buckets.nearest(np.zeros((0, 2), int), sizes).shape == (0,)


def test_fit_covers_and_cuts_about_the_centre():
    rng = np.random.default_rng(0)
    for _ in range(60):
        h, w = rng.integers(1, 200, 2)
        size = tuple(int(s) for s in rng.integers(1, 100, 2))
        flat = buckets.fit(np.full((h, w, 3), 77, np.uint8), size)
        assert flat.shape == (size[1], size[0], 3)
        assert flat.dtype == np.uint8
        assert (flat == 77).all()
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = 255  # exactly what is kept
    assert buckets.fit(picture, (32, 32))[:, 1:-1].min() > 250
    same = rng.integers(0, 256, (16, 32, 3), np.uint8)
    assert buckets.fit(same, (32, 16)) is same
    smooth = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    small = buckets.fit(smooth, (16, 16)).astype(int)
    assert abs(small - (255 - small[:, ::-1])).max() <= 2

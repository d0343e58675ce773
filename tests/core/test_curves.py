"""Curves as pictures."""

import numpy as np
import pytest

from unipic_jax.core.curves import MARGIN, SIZE, curve

MEAN, VALUES = (0x1f, 0x3b, 0x63), (0x9d, 0xb8, 0xd9)


def test_a_curve_rises_from_corner_to_corner():
    shown = np.asarray(curve(np.linspace(0, 1, 101).tolist(), "reward"))
    line = (shown == VALUES).all(-1) | (shown == MEAN).all(-1)
    rows, columns = np.nonzero(line)
    assert columns.min() == pytest.approx(MARGIN, abs=2)
    assert columns.max() == pytest.approx(SIZE[0] - MARGIN, abs=2)
    assert rows[columns == columns.min()].mean() == pytest.approx(SIZE[1] - MARGIN, abs=4)
    assert rows[columns == columns.max()].mean() == pytest.approx(MARGIN, abs=8)
    middle = columns == SIZE[0] // 2
    assert rows[middle].mean() == pytest.approx(SIZE[1] / 2, abs=6)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [-1.0, 2.0, 0.0]])
def test_few_values_are_drawn_too(values):
    shown = np.asarray(curve(values, ""))
    assert (shown == MEAN).all(-1).any() or len(values) == 1

# SPDX-License-Identifier: Apache-2.0
"""How Triton's kernels of the norms walk memory: no device, no interpreter."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.6")

from norm_cases import KINDS

from revkernels.triton_kernels.norm_layout import plane


class TestPlane:
    """How memory is walked: no device, no interpreter."""

    def test_units_divide_what_is_not_1(self):
        """56 channels, or an image of 8 by 8 whose half is used, move as many bytes at a time as powers of two do."""
        rows = plane("batch", 1, (10, 56), [(112, 1), (56, 1)])
        assert (rows.unit, rows.channel_unit, rows.position_unit, rows.minors) == (8, 8, 1, ("channel", "channel"))
        assert rows.strides == ((0, 0, 14, 0), (0, 0, 7, 0))
        image = plane("batch", 1, (3, 5, 8, 8), [(640, 64, 8, 1)])
        assert (image.rows, image.positions, image.minors, image.unit) == (3, 64, ("position",), 8)
        assert plane("batch", 1, (3, 5, 7, 7), [(245, 49, 7, 1)]).unit == 1
        assert plane("layer", 1, (3, 20), [(20, 1)]).unit == 4

    def test_statistics_of_rows_are_walked_too(self):
        """Channels last: rows lie one after another. In any other order they are counted as the array's own order has
        them."""
        image = plane("layer", 1, (2, 6, 5, 7), [(210, 1, 42, 6)])
        assert (image.rows, image.positions, image.statistic) == (1, 70, (0, 1))
        turned = plane("layer", 2, (4, 5, 6), [(6, 24, 1)])  # dimension 1 outermost in memory
        assert (turned.rows, turned.positions, turned.statistic) == (5, 4, (1, 5))

    def test_samples_of_a_group_norm_stay_apart(self):
        tokens = plane("group", 2, (3, 5, 8), [(40, 8, 1)])
        assert (tokens.samples, tokens.rows, tokens.positions, tokens.strides) == (3, 1, 5, ((5, 0, 1, 0),))
        with pytest.raises(ValueError, match="do not merge"):
            plane("group", 1, (3, 8, 4, 4), [(1000, 100, 10, 1)])

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("elements", [512, 1024, 2048])
    @pytest.mark.parametrize("shape", [(1, 1), (5, 3), (1000, 56), (4, 5000), (70000, 1)])
    def test_tiles_are_powers_of_two_and_hold_what_they_may(self, kind, shape, elements):
        for strides in ((shape[1], 1), (1, shape[0])):
            over = plane(kind, 1, shape, [strides])
            for tile, most in ((over.tile(elements), elements), (over.row_tile(elements, 8192), 8192)):
                assert all(side & (side - 1) == 0 and side > 0 for side in tile)
                assert tile[0] * tile[1] <= most

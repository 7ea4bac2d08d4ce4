"""The figure that explains matching shows what the published function does."""

import numpy as np
import pytest

from ldm.evaluation.grid_figure import H, W, draw, groups_of, small_picture


def test_half_of_the_tokens_go_and_groups_get_their_means():
    picture = small_picture()
    groups, merged = groups_of(picture)
    assert len(np.unique(groups)) == H * W // 2
    flat, shown = picture.reshape(-1, 3), merged.reshape(-1, 3)
    for group in np.unique(groups):
        np.testing.assert_allclose(
            shown[groups == group],
            np.broadcast_to(flat[groups == group].mean(0), (sum(groups == group), 3)),
            atol=1e-5,
        )


def test_it_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e .[bench]")
    draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

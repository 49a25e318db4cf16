"""Position embeddings for another image size, against PyTorch."""

import numpy as np
import pytest

from bvit_jax.weights.resize import resize_positions


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (3, 8), (7, 1), (1, 5), (2, 3)])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_equals_torch(old, new, extra):
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).standard_normal((1, extra + old * old, 5))
    grid = torch.from_numpy(positions[:, extra:]).reshape(1, old, old, 5).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    expected = np.concatenate(
        [positions[:, :extra], grid.permute(0, 2, 3, 1).reshape(1, new * new, 5)], axis=1
    )
    np.testing.assert_allclose(resize_positions(positions, extra, new), expected, rtol=0, atol=1e-13)


def test_the_same_size_changes_nothing():
    positions = np.random.default_rng(0).standard_normal((1, 17, 3)).astype(np.float32)
    resized = resize_positions(positions, 1, 4)
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resized, positions)


def test_a_constant_stays_constant():
    np.testing.assert_allclose(resize_positions(np.full((1, 9, 2), 0.7), 0, 7), 0.7, atol=1e-15)

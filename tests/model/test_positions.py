"""Sines of row and column in the tower of a model that is trained from scratch.

In: nothing. Out: where they stand, and where not. That two ZeRO-3 ranks start from the same bits is in test_weights.py.
"""

from __future__ import annotations

import pytest
import torch

from eventlens_ds.model.positions import sines, start_from_sines
from tests.model import tiny_folders as tiny


def test_near_patches_are_alike_and_no_two_are_equal() -> None:
    table = sines(8, 6, 32)
    assert table.shape == (48, 32) and len({tuple(row.tolist()) for row in table}) == 48
    alike = (table @ table.T).view(8, 6, 8, 6)
    assert alike[3, 2, 3, 3] > alike[3, 2, 3, 4] and alike[3, 2, 4, 2] > alike[3, 2, 5, 2]
    # Row and column have parts of their own: a step down changes nothing in the half that tells columns apart.
    assert torch.equal(table.view(8, 6, 32)[0, :, 16:], table.view(8, 6, 32)[5, :, 16:])
    with pytest.raises(ValueError, match="width 30"):
        sines(2, 2, 30)


def test_a_new_tower_starts_from_them_behind_its_class_token() -> None:
    model = tiny.loaded({}, 0)[0]
    weight = model.vision_tower.embeddings.position_embedding.weight
    assert torch.equal(weight[1:], sines(8, 8, 128)) and not weight[0].any() and weight.requires_grad


def test_a_tower_whose_width_they_do_not_fit_keeps_its_own() -> None:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position_embedding = torch.nn.Embedding(5, 6)

    tower = Tower()
    before = tower.position_embedding.weight.detach().clone()
    start_from_sines(tower)
    assert torch.equal(tower.position_embedding.weight, before)

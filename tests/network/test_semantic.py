"""The semantic branch: what it learns from, by hand, and what it adds."""

import pytest
import torch
from family_cases import confident, family, picture_and_target

from dsg.model.network.batch import stack_targets
from dsg.model.network.semantic import map_of_data, map_of_instances, semantic_loss

X = 255


def targets(**extra):
    """A large instance of class 2 that covers the left half, a small one of class 1 inside it; 32 x 64 pixels."""
    masks = torch.zeros(2, 32, 64, dtype=torch.uint8)
    masks[0, 8:16, 8:16] = 1
    masks[1, :, :32] = 1
    own = {
        "boxes": torch.tensor([[8.0, 8, 16, 16], [0, 0, 32, 32]]),
        "labels": torch.tensor([1, 2]),
        "masks": masks,
        **extra,
    }
    return stack_targets([own], [torch.rand(3, 32, 64)], 3)


def test_instances_by_hand():
    """Cells of 8 pixels, looked at in their middle; the picture is 32 x 56 of a batch of 32 x 64."""
    wanted = map_of_instances(targets(), torch.tensor([[32, 56]]), (4, 8))
    assert wanted[0].tolist() == [
        [2, 2, 2, 2, 0, 0, 0, X],
        [2, 1, 2, 2, 0, 0, 0, X],
        [2, 2, 2, 2, 0, 0, 0, X],
        [2, 2, 2, 2, 0, 0, 0, X],
    ]
    crowd = targets(ignore_boxes=torch.tensor([[40.0, 0, 48, 16]]), has_mask=torch.tensor([True, False]))
    crowd.masks[0][1] = 0  # where only the box is known there is no mask
    wanted = map_of_instances(crowd, torch.tensor([[32, 64]]), (4, 8))
    assert wanted[0, :2].tolist() == [[X, X, X, X, 0, X, 0, 0], [X, 1, X, X, 0, X, 0, 0]]


def test_maps_of_the_data_by_hand():
    semantic = torch.zeros(32, 64, dtype=torch.uint8)
    semantic[:, 8:16] = 7
    semantic[4, 4] = 5
    semantic[12, 4] = 200  # a class that the network does not have
    wanted = map_of_data(targets(semantic=semantic), (4, 10), 183)
    assert wanted[0, 0].tolist() == [5, 7, 0, 0, 0, 0, 0, 0, X, X]
    assert wanted[0, 1].tolist()[:2] == [X, 7]
    with pytest.raises(ValueError, match="targets lack `semantic`"):
        map_of_data(targets(), (4, 8), 183)
    with pytest.raises(ValueError, match="target 0: semantic must be"):
        targets(semantic=torch.zeros(3, 3))


def test_loss_where_all_is_unknown_is_a_zero_with_a_gradient():
    logits = torch.rand(1, 5, 2, 3, requires_grad=True)
    loss = semantic_loss(logits, torch.full((1, 2, 3), X))
    loss.backward()
    assert float(loss.detach()) == 0 and not logits.grad.any()
    wanted = torch.tensor([[[0, 1, X], [X, X, X]]])
    expected = torch.nn.functional.cross_entropy(logits[0, :, 0, :2].T, torch.tensor([0, 1]))
    torch.testing.assert_close(semantic_loss(logits, wanted), expected)


def test_a_network_that_learns_stuff():
    model = family("htc_dsg", semantic="stuff", semantic_classes=9)
    picture, target = picture_and_target()
    target["semantic"] = torch.randint(0, 9, picture.shape[1:], dtype=torch.uint8)
    losses = model([picture], [target])
    losses["loss_semantic"].backward()
    assert model.semantic.classifier.weight.grad.any() and model.semantic.laterals[4].weight.grad.any()
    with pytest.raises(ValueError, match="targets lack `semantic`"):
        model([picture], [picture_and_target()[1]])


@torch.no_grad()
def test_it_changes_boxes_and_masks():
    model = confident(family("htc"))
    picture = torch.rand(3, 64, 96)
    (before,) = model([picture])
    model.semantic.embedding.bias += 1
    (after,) = model([picture])
    assert not torch.allclose(before.scores, after.scores)
    model.semantic.embedding.weight.zero_(), model.semantic.embedding.bias.zero_()
    (without,) = model([picture])
    model.semantic = None
    (off,) = model([picture])
    torch.testing.assert_close(off.mask_probs, without.mask_probs)

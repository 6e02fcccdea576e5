"""An imported Mask R-CNN predicts what torchvision's predicts: live, with random weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision_twins import our_twin, torchvision_mask_rcnn

from dsg.model.network.image_tensor import resize
from dsg.model.network.predictor import Predictor

# As many as show that each cut takes the same ones; float64 convolutions take long.
CANDIDATES, PROPOSALS, DETECTIONS = 200, 150, 40


def picture(seed: int, height: int, width: int) -> Tensor:
    """Float [3, height, width] in 0..1 with structure at several scales, so that boxes differ."""
    generator = torch.Generator().manual_seed(seed)
    coarse = functional.interpolate(torch.rand(1, 3, 5, 7, generator=generator), (height, width), mode="bicubic")
    fine = functional.interpolate(torch.rand(1, 3, 23, 31, generator=generator), (height, width), mode="bilinear")
    return (0.7 * coarse + 0.3 * fine)[0].clamp(0, 1)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    theirs = torchvision_mask_rcnn(
        0,
        short_side=128,
        long_side=256,
        rpn_pre_nms_top_n_test=CANDIDATES,
        rpn_post_nms_top_n_test=PROPOSALS,
        box_detections_per_img=DETECTIONS,
    )
    ours, info = our_twin(theirs, tmp_path_factory.mktemp("twins"))
    ours.selector.candidates, ours.selector.proposals = (CANDIDATES, CANDIDATES), (PROPOSALS, PROPOSALS)
    ours.config = replace(ours.config, max_detections=DETECTIONS)
    return theirs, ours, info


def test_float64_predictions_are_equal(twins):
    theirs, ours, _ = twins
    theirs, ours = theirs.double(), ours.double()
    # short sides of 128 and long ones below 256, so that torchvision's own resize changes nothing
    for seed, sizes in enumerate([[(128, 192)], [(160, 128), (128, 128)]]):
        pictures = [picture(seed * 10 + number, *size).double() for number, size in enumerate(sizes)]
        with torch.no_grad():
            expected, found = theirs(pictures), ours(pictures)
        for wanted, got in zip(expected, found, strict=True):
            assert len(got) == len(wanted["boxes"]) > 20
            assert torch.equal(got.labels, wanted["labels"])
            assert (got.boxes - wanted["boxes"]).abs().max() < 1e-6
            assert (got.scores - wanted["scores"]).abs().max() < 1e-9
            assert torch.equal(got.masks(), wanted["masks"][:, 0] >= 0.5)
    theirs.float(), ours.float()


def test_float32_predictions_match_through_the_predictor(twins):
    """With torchvision's resize in the way: 100 x 150 becomes 128 x 192."""
    theirs, ours, info = twins
    assert (info.resize.short_side, info.resize.long_side, info.resize.antialias) == (800, 1333, False)
    small = Predictor(ours, with_resize(info, 128, 256))
    original = picture(7, 100, 150)
    with torch.no_grad():
        wanted = theirs([original])[0]
    found = small.predict([original], score_threshold=0.0)[0]
    assert found.image_size == (100, 150)
    unmatched = 0
    for box, label, score in zip(wanted["boxes"], wanted["labels"], wanted["scores"], strict=True):
        close = (found.boxes - box).abs().amax(dim=1) < 2e-2
        close &= (found.labels == label) & ((found.scores - score).abs() < 1e-4)
        unmatched += not bool(close.any())
    assert unmatched <= 0.02 * len(wanted["boxes"])


def test_float64_predictions_are_equal_through_the_resize(twins):
    """100 x 150 and 301 x 97 pixels, scaled by both sides to short sides of 128."""
    theirs, ours, info = twins
    small = Predictor(ours.double(), with_resize(info, 128, 256))
    for height, width in [(100, 150), (301, 97)]:
        original = picture(height, height, width).double()
        with torch.no_grad():
            wanted = theirs.double()([original])[0]
        (found,) = small.predict([original], score_threshold=0.0)
        assert len(found) == len(wanted["boxes"]) > 10
        assert torch.equal(found.labels, wanted["labels"])
        assert (found.boxes - wanted["boxes"]).abs().max() < 1e-6
        assert torch.equal(found.masks(), wanted["masks"][:, 0] >= 0.5)
    theirs.float(), ours.float()


def test_resize_is_torchvisions(twins):
    theirs, _, info = twins
    how = with_resize(info, 128, 256).resize
    for height, width in [(97, 301), (333, 200), (128, 128), (640, 480)]:
        original = picture(height, height, width)
        wanted, _ = theirs.transform.resize(original, None)
        assert torch.equal(resize(original, how), wanted)


def test_all_91_outputs_are_kept_with_their_category_ids(twins):
    _, ours, info = twins
    assert info.category_ids == list(range(1, 91))
    assert info.category_names[0] == "person" and info.category_names[89] == "toothbrush"
    assert ours.box_head.classifier.out_features == 91


def with_resize(info, short_side: int, long_side: int):
    return replace(info, resize=replace(info.resize, short_side=short_side, long_side=long_side))

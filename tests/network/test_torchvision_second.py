"""torchvision's second recipe, and a DSG that starts from torchvision's Mask R-CNN: the same detections."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torchvision_twins import our_twin, torchvision_mask_rcnn

SIDE = 64  # float64 convolutions take long


def picture(seed: int, height: int, width: int):
    generator = torch.Generator().manual_seed(seed)
    coarse = functional.interpolate(torch.rand(1, 3, 5, 7, generator=generator), (height, width), mode="bicubic")
    return coarse[0].clamp(0, 1)


@pytest.mark.parametrize(
    ("second", "preset"),
    [(True, "mask_rcnn_r50_v2_fpn"), (False, "dsg_r50_fpn")],
)
def test_imported_networks_predict_what_torchvision_predicts(second, preset, tmp_path):
    limits = {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 60, "box_detections_per_img": 30}
    theirs = torchvision_mask_rcnn(1, SIDE, 2 * SIDE, second=second, **limits)
    ours, info = our_twin(theirs, tmp_path, preset)
    assert info.preset == preset and info.category_ids == list(range(1, 91))
    ours.selector.candidates, ours.selector.proposals = (100, 100), (60, 60)
    ours.config = replace(ours.config, max_detections=30)
    one = picture(2, SIDE, SIDE + 32)
    with torch.no_grad():
        for wide, box, score in ((False, 2e-2, 1e-4), (True, 1e-6, 1e-9)):
            pictures = [one.double()] if wide else [one]
            if wide:
                theirs, ours = theirs.double(), ours.double()
            (wanted,), (found,) = theirs(pictures), ours(pictures)
            if wide:
                assert len(found) == len(wanted["boxes"]) > 10
                assert torch.equal(found.labels, wanted["labels"])
                assert (found.boxes - wanted["boxes"]).abs().max() < box
                assert (found.scores - wanted["scores"]).abs().max() < score
                assert torch.equal(found.masks(), wanted["masks"][:, 0] >= 0.5)
                continue
            close = (found.boxes[:, None] - wanted["boxes"]).abs().amax(dim=2) < box
            close &= (found.labels[:, None] == wanted["labels"]) & (
                (found.scores[:, None] - wanted["scores"]).abs() < score
            )
            assert close.any(dim=0).float().mean() >= 0.98

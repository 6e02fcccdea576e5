"""A network with guidance that starts from a plain one: the same detections, and guidance that can be learned."""

import pytest
import torch
from family_cases import confident, family, losses_of

from dsg.model.network.guided_start import guided_start, lacks_guidance

PAIRS = [("mask_rcnn", "dsg"), ("mask scoring", "mask scoring dsg"), ("cascade_mask_rcnn", "cascade_dsg"),
         ("htc", "htc_dsg")]  # fmt: skip


def started(plain, guided):
    """The guided network with the plain one's weights."""
    own = guided.state_dict()
    assert lacks_guidance(own, plain.state_dict()) and not lacks_guidance(own, own)
    merged = {**plain.state_dict(), **guided_start(own, plain.state_dict())}
    guided.load_state_dict(merged)  # nothing missing, nothing left over
    return guided


@torch.no_grad()
@pytest.mark.parametrize(("name", "guided_name"), PAIRS)
def test_detections_are_the_same_in_float64(name, guided_name):
    plain = confident(family(name)).double()
    guided = started(plain, family(guided_name).double()).eval()
    pictures = [torch.rand(3, 64, 96, dtype=torch.float64), torch.rand(3, 50, 70, dtype=torch.float64)]
    for wanted, found in zip(plain(pictures), guided(pictures), strict=True):
        assert len(wanted) == len(found) > 0 and torch.equal(wanted.labels, found.labels)
        for field in ("boxes", "scores", "mask_probs"):
            assert (getattr(wanted, field) - getattr(found, field)).abs().max() < 1e-9
    guided.guidance_scale.fill_(1)
    assert not torch.allclose(guided(pictures)[0].scores, plain(pictures)[0].scores)


@pytest.mark.parametrize(("name", "guided_name"), PAIRS)
def test_fusions_that_start_at_zero_learn(name, guided_name):
    guided = started(confident(family(name)), family(guided_name)).train()
    sum(losses_of(guided, "plain").values()).backward()
    fusions = {key: p for key, p in guided.named_parameters() if "fuse_" in key and key.endswith("conv.weight")}
    assert fusions and all(p.grad.any() for p in fusions.values())


def test_a_convolution_between_htcs_mask_heads_lies_in_the_middle_of_the_larger_one():
    plain, guided = family("htc"), family("htc_dsg")
    small = plain.stages[1].fuse_mask.conv.weight
    large = started(plain, guided).stages[1].fuse_mask.conv.weight
    assert small.shape[-1] == 1 and large.shape[-1] == 3
    assert torch.equal(large[..., 1, 1], small[..., 0, 0]) and not large[..., 0, :].any()

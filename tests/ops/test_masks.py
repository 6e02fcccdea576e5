"""Pasting and encoding against torchvision's pasting and pycocotools' RLE."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from dsg.ops import masks as masks_module
from dsg.ops.masks import encode_masks, paste_masks
from dsg.ops.rle import decode_rle

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return request.param


def random_probs(generator, number, side, kind):
    """Noise, noise of three values (ties at the threshold of 0.5), smooth blobs, or 0.5 everywhere."""
    if kind == "noise":
        return torch.rand((number, side, side), generator=generator)
    if kind == "steps":
        return torch.randint(0, 3, (number, side, side), generator=generator) / 2
    if kind == "flat":
        return torch.full((number, side, side), 0.5)
    axis = torch.linspace(-1, 1, side)
    distance = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
    noise = torch.randn((number, side, side), generator=generator)
    return torch.sigmoid((0.8 - distance) * 10 + noise)


def random_boxes(generator, number, image_size, largest=1.0, inside=True):
    """Boxes with sides up to `largest` times the picture's, with middles in it, or up to half a box off."""
    size = torch.tensor([image_size[1], image_size[0]], dtype=torch.float32)
    sides = torch.rand((number, 2), generator=generator) ** 2 * largest * size
    middles = torch.rand((number, 2), generator=generator) * size
    if not inside:
        middles = middles + (torch.rand((number, 2), generator=generator) - 0.5) * sides
    return torch.cat((middles - sides / 2, middles + sides / 2), dim=1)


def torchvision_paste(probs, boxes, image_size, threshold=0.5):
    return (paste_masks_in_image(probs[:, None], boxes, image_size) >= threshold)[:, 0]


def oracle(masks):
    rles = [coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8))) for mask in masks]
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in rles]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["noise", "steps", "flat", "blobs"]),
    st.sampled_from([1, 2, 14, 28]),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([0.5, 0.3, 0.0, 1.0]),
)
def test_masks_are_torchvisions_and_rles_are_pycocotools(seed, kind, side, height, width, threshold):
    generator = torch.Generator().manual_seed(seed)
    probs = random_probs(generator, 4, side, kind)
    boxes = random_boxes(generator, 4, (height, width))
    expected = torchvision_paste(probs, boxes, (height, width), threshold)
    # torchvision leaves the picture outside a box at 0, which reaches a threshold of 0; outside is never
    # set here.
    if threshold > 0:
        assert torch.equal(paste_masks(probs, boxes, (height, width), threshold), expected)
    pasted = paste_masks(probs, boxes, (height, width), threshold)
    assert encode_masks(probs, boxes, (height, width), threshold) == oracle(pasted)


@pytest.mark.parametrize("kind", ["noise", "steps", "flat", "blobs"])
@pytest.mark.parametrize("image_size", [(48, 64), (131, 47)])
def test_boxes_much_larger_than_the_picture(device, kind, image_size):
    # These boxes are resized in the window alone, which must not change a single bit of what PyTorch
    # computes.
    generator = torch.Generator().manual_seed(len(kind))
    probs = random_probs(generator, 30, 28, kind).to(device)
    boxes = random_boxes(generator, 30, image_size, largest=40, inside=False).to(device)
    overlapping = [
        index
        for index, window in enumerate(boxes.tolist())
        if window[0] < image_size[1] - 2 and window[1] < image_size[0] - 2 and window[2] > 2 and window[3] > 2
    ]
    probs, boxes = probs[overlapping], boxes[overlapping]  # torchvision fails on boxes that miss the picture
    assert len(overlapping) > 10
    expected = torchvision_paste(probs, boxes, image_size)
    assert torch.equal(paste_masks(probs, boxes, image_size), expected)
    assert encode_masks(probs, boxes, image_size) == oracle(expected)


@pytest.mark.parametrize("side", [1, 14, 28])
def test_every_window_equals_the_whole_resize(device, side, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    probs = random_probs(generator, 40, side, "steps").to(device)
    boxes = random_boxes(generator, 40, (300, 400), largest=2).to(device)
    expected = paste_masks(probs, boxes, (300, 400))
    monkeypatch.setattr(masks_module, "_WHOLE_BOX_FACTOR", 0)
    monkeypatch.setattr(masks_module, "_BLOCK_PIXELS", 5000)
    assert torch.equal(paste_masks(probs, boxes, (300, 400)), expected)


@pytest.mark.parametrize("size", [(1, 16385), (16385, 1), (2, 8193), (8193, 2), (16, 1025), (129, 128)])
def test_window_values_are_those_of_the_whole_resize(device, size):
    # The thinnest and the smallest boxes of which only the window is ever computed.
    mask = torch.rand((30, 30), generator=torch.Generator().manual_seed(8)).to(device)
    whole = F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    rows, columns = slice(size[0] // 3, size[0]), slice(0, size[1] - size[1] // 3)
    fused = masks_module._multiply_add_is_fused(mask.device)
    values = masks_module._window_values(mask, size, rows, columns, fused)
    assert torch.equal(values, whole[rows, columns])


def test_a_box_far_larger_than_memory():
    probs = torch.ones(1, 28, 28)
    boxes = torch.tensor([[-3e9, -2e9, 3e9, 2e9]])
    assert paste_masks(probs, boxes, (20, 30)).all()
    assert encode_masks(probs, boxes, (20, 30)) == oracle(torch.ones(1, 20, 30))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("coordinate", range(4))
def test_boxes_that_are_not_finite_give_empty_masks(bad, coordinate):
    boxes = torch.tensor([[2.0, 2.0, 9.0, 9.0], [2.0, 2.0, 9.0, 9.0]])
    boxes[0, coordinate] = bad
    masks = paste_masks(torch.ones(2, 14, 14), boxes, (12, 15))
    assert not masks[0].any() and masks[1].any()
    assert encode_masks(torch.ones(2, 14, 14), boxes, (12, 15)) == oracle(masks)


@pytest.mark.parametrize(
    "box",
    [[-50, 2, -20, 9], [60, 2, 90, 9], [2, -30, 9, -5], [2, 40, 9, 50], [9, 9, 2, 2], [1e30, 0, 2e30, 5]],
)
def test_boxes_that_miss_the_picture_or_are_inside_out_give_empty_masks(box):
    boxes = torch.tensor([box], dtype=torch.float32)
    assert not paste_masks(torch.ones(1, 14, 14), boxes, (12, 15)).any()
    assert encode_masks(torch.ones(1, 14, 14), boxes, (12, 15)) == oracle(torch.zeros(1, 12, 15))


def test_corners_by_hand():
    # m = 2: the box grows by 4 / 2, from (4, 4, 8, 6) to (2, 3, 10, 7); 9 x 5 pixels of a 4 x 4 grid with a
    # rim of 0.
    masks = paste_masks(torch.ones(1, 2, 2), torch.tensor([[4.0, 4.0, 8.0, 6.0]]), (10, 14))
    # Along x, sample i sits at (i + 0.5) * 4 / 9 - 0.5: above 0.5 for i >= 2, below 2.5 for i <= 6. Along y
    # likewise at (i + 0.5) * 4 / 5 - 0.5, for i = 1..3; at the corners the product of both weights decides.
    weight_x = [min(max(v, 0), 3 - max(v, 0), 1) for v in ((i + 0.5) * 4 / 9 - 0.5 for i in range(9))]
    weight_y = [min(max(v, 0), 3 - max(v, 0), 1) for v in ((i + 0.5) * 4 / 5 - 0.5 for i in range(5))]
    expected = torch.zeros(10, 14, dtype=torch.bool)
    expected[3:8, 2:11] = torch.outer(torch.tensor(weight_y), torch.tensor(weight_x)) >= 0.5
    assert torch.equal(masks[0], expected)
    assert masks[0, 5, 4:9].all() and not masks[0, 5, 3] and not masks[0, 5, 9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(3)
    probs = random_probs(generator, 3, 28, "blobs").to(dtype)
    boxes = random_boxes(generator, 3, (40, 50))
    assert encode_masks(probs, boxes, (40, 50)) == encode_masks(probs.float(), boxes, (40, 50))
    assert torch.equal(paste_masks(probs, boxes, (40, 50)), torchvision_paste(probs.float(), boxes, (40, 50)))


def test_float64_stays_float64():
    generator = torch.Generator().manual_seed(4)
    probs = random_probs(generator, 3, 28, "steps").double()
    boxes = random_boxes(generator, 3, (40, 50)).double()
    assert torch.equal(paste_masks(probs, boxes, (40, 50)), torchvision_paste(probs, boxes, (40, 50)))


def test_probs_that_carry_a_gradient():
    probs = torch.ones(1, 14, 14, requires_grad=True)
    assert not paste_masks(probs, torch.tensor([[1.0, 1.0, 8.0, 8.0]]), (12, 15)).requires_grad
    assert len(encode_masks(probs, torch.tensor([[1.0, 1.0, 8.0, 8.0]]), (12, 15))) == 1


def test_no_masks(device):
    probs, boxes = torch.zeros(0, 28, 28, device=device), torch.zeros(0, 4, device=device)
    masks = paste_masks(probs, boxes, (12, 15))
    assert masks.shape == (0, 12, 15) and masks.dtype == torch.bool and masks.device == probs.device
    assert encode_masks(probs, boxes, (12, 15)) == []


def test_many_masks_on_the_device(device, monkeypatch):
    # Small transfers, so that several are needed.
    monkeypatch.setattr(masks_module, "_TRANSFER_PIXELS", 3000)
    generator = torch.Generator().manual_seed(6)
    probs = random_probs(generator, 50, 28, "blobs").to(device)
    boxes = random_boxes(generator, 50, (120, 160), inside=True).to(device)
    expected = torchvision_paste(probs, boxes, (120, 160))
    assert torch.equal(paste_masks(probs, boxes, (120, 160)), expected)
    assert encode_masks(probs, boxes, (120, 160)) == oracle(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_and_cpu_differ_in_hardly_a_pixel():
    generator = torch.Generator().manual_seed(7)
    probs = random_probs(generator, 100, 28, "noise")
    boxes = random_boxes(generator, 100, (480, 640))
    on_cpu = [decode_rle(rle) for rle in encode_masks(probs, boxes, (480, 640))]
    on_cuda = [decode_rle(rle) for rle in encode_masks(probs.cuda(), boxes.cuda(), (480, 640))]
    assert (np.stack(on_cpu) != np.stack(on_cuda)).mean() <= 1e-5


@pytest.mark.parametrize(
    ("probs", "boxes", "image_size", "error", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 4), (5, 5), ValueError, r"probs must be \[N, m, m\]"),
        (torch.ones(2, 3, 3), torch.ones(1, 4), (5, 5), ValueError, r"boxes must be \[2, 4\]"),
        (torch.ones(2, 3, 3), torch.ones(2, 4), (5, 0), ValueError, "both at least 1"),
        (torch.ones(2, 3, 3, dtype=torch.int64), torch.ones(2, 4), (5, 5), TypeError, "floating point"),
        (torch.ones(2, 3, 3), torch.ones(2, 4, dtype=torch.int64), (5, 5), TypeError, "floating point"),
    ],
)
def test_wrong_arguments(probs, boxes, image_size, error, message):
    with pytest.raises(error, match=message):
        encode_masks(probs, boxes, image_size)
    with pytest.raises(error, match=message):
        paste_masks(probs, boxes, image_size)


def test_several_pictures_at_once_are_each_alone(device):
    generator = torch.Generator().manual_seed(11)
    batches = []
    for number, size in ((4, (60, 80)), (0, (33, 21)), (3, (120, 50))):
        probs = random_probs(generator, number, 14, "steps").to(device)
        batches.append((probs, random_boxes(generator, number, size, inside=False).to(device), size))
    encoded = masks_module.encode_mask_batches(batches)
    assert [len(texts) for texts, _ in encoded] == [4, 0, 3]
    for (texts, areas), (probs, boxes, size) in zip(encoded, batches, strict=True):
        masks = paste_masks(probs, boxes, size)
        assert texts == [rle["counts"] for rle in oracle(masks)]
        assert areas == masks.sum(dim=(1, 2)).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["noise", "steps", "flat", "blobs"]),
    st.sampled_from([1, 2, 14, 28]),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([0.5, 0.3, 1.0]),
    st.sampled_from([1.0, 5.0, 40.0]),
    st.sampled_from(["box", "grid"]),
)
def test_on_a_gpu_too_rles_are_those_of_the_pasted_masks(seed, kind, side, height, width, threshold, largest, paste):
    # Sampled at pixel centres by two kernels, a value of just the threshold may come out a rounding below it.
    assume(paste == "box" or kind in ("noise", "blobs") or threshold == 0.3)
    generator = torch.Generator().manual_seed(seed)
    probs = random_probs(generator, 5, side, kind).cuda()
    boxes = random_boxes(generator, 5, (height, width), largest, inside=False).cuda()
    boxes[0] = torch.tensor([-9.0, -7.0, width + 9.0, height + 7.0])
    pasted = paste_masks(probs, boxes, (height, width), threshold, paste)
    assert encode_masks(probs, boxes, (height, width), threshold, paste) == oracle(pasted)
    ((_, areas),) = masks_module.encode_mask_batches([(probs, boxes, (height, width))], threshold, paste)
    assert areas == pasted.sum(dim=(1, 2)).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kind", ["blobs", "noise"])
def test_300_masks_of_12_megapixels_take_little_memory(kind):
    generator = torch.Generator().manual_seed(12)
    probs = random_probs(generator, 300, 28, kind).cuda()
    boxes = random_boxes(generator, 300, (3000, 4000)).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rles = encode_masks(probs, boxes, (3000, 4000))
    assert torch.cuda.max_memory_allocated() - before < 64e6
    for number in (0, 150, 299):
        pasted = paste_masks(probs[number : number + 1], boxes[number : number + 1], (3000, 4000))
        assert [rles[number]] == oracle(pasted)

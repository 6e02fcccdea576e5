"""State dicts as other projects write them, from the published tables of their names; values are random."""

import torch

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def _norm(name: str, channels: int, style: str) -> dict[str, tuple[int, ...]]:
    fields = {f"{name}.{field}": (channels,) for field in ("weight", "bias", "running_mean", "running_var")}
    return fields | ({f"{name}.num_batches_tracked": ()} if style == "mmdet" else {})


def _body(style: str, depth: int, width: int = 64, groups: int = 1, deformable: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of a bottleneck ResNet by the project's names."""
    d2 = style == "detectron2"
    stem = "backbone.bottom_up.stem.conv1" if d2 else "backbone.conv1"
    shapes: dict[str, tuple[int, ...]] = {f"{stem}.weight": (64, 3, 7, 7)}
    shapes |= _norm(f"{stem}.norm" if d2 else "backbone.bn1", 64, style)
    channels = 64
    for stage, blocks in enumerate(_BLOCKS[depth]):
        planes, out = 64 * 2**stage, 256 * 2**stage
        inner = planes * width // 64 * groups
        for block in range(blocks):
            name = f"backbone.bottom_up.res{stage + 2}.{block}" if d2 else f"backbone.layer{stage + 1}.{block}"
            convs = ((inner, channels, 1, 1), (inner, inner // groups, 3, 3), (out, inner, 1, 1))
            for number, shape in enumerate(convs, start=1):
                shapes[f"{name}.conv{number}.weight"] = shape
                shapes |= _norm(f"{name}.conv{number}.norm" if d2 else f"{name}.bn{number}", shape[0], style)
            if deformable and stage > 0:
                offset = f"{name}.conv2_offset" if d2 else f"{name}.conv2.conv_offset"
                shapes |= {f"{offset}.weight": (deformable, inner, 3, 3), f"{offset}.bias": (deformable,)}
            if block == 0:
                shortcut, norm = ("shortcut", "shortcut.norm") if d2 else ("downsample.0", "downsample.1")
                shapes[f"{name}.{shortcut}.weight"] = (out, channels, 1, 1)
                shapes |= _norm(f"{name}.{norm}", out, style)
            channels = out
    return shapes


def _layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    bias = shape[1] if name.endswith(("deconv", "upsample")) else shape[0]
    return {f"{name}.weight": shape, f"{name}.bias": (bias,)}


def detectron2(depth=50, cascade=False, classes=80, **body) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Mask R-CNN or Cascade Mask R-CNN with FPN."""
    shapes = _body("detectron2", depth, **body)
    for level, channels in zip((2, 3, 4, 5), (256, 512, 1024, 2048), strict=True):
        shapes |= _layer(f"backbone.fpn_lateral{level}", 256, channels, 1, 1)
        shapes |= _layer(f"backbone.fpn_output{level}", 256, 256, 3, 3)
    rpn = "proposal_generator.rpn_head"
    shapes |= _layer(f"{rpn}.conv", 256, 256, 3, 3) | _layer(f"{rpn}.objectness_logits", 3, 256, 1, 1)
    shapes |= _layer(f"{rpn}.anchor_deltas", 12, 256, 1, 1)
    for stage in ("0.", "1.", "2.") if cascade else ("",):
        shapes |= _layer(f"roi_heads.box_head.{stage}fc1", 1024, 256 * 49)
        shapes |= _layer(f"roi_heads.box_head.{stage}fc2", 1024, 1024)
        shapes |= _layer(f"roi_heads.box_predictor.{stage}cls_score", classes + 1, 1024)
        shapes |= _layer(f"roi_heads.box_predictor.{stage}bbox_pred", 4 if cascade else 4 * classes, 1024)
    for number in (1, 2, 3, 4):
        shapes |= _layer(f"roi_heads.mask_head.mask_fcn{number}", 256, 256, 3, 3)
    shapes |= _layer("roi_heads.mask_head.deconv", 256, 256, 2, 2)
    return shapes | _layer("roi_heads.mask_head.predictor", classes, 256, 1, 1)


def mmdet(version, depth=50, kind="mask_rcnn", classes=80, **body) -> dict[str, tuple[int, ...]]:
    """Names and shapes of mask_rcnn, cascade_mask_rcnn or htc with FPN, in version 1 or 2."""
    shapes = _body("mmdet", depth, **body)
    for level, channels in enumerate((256, 512, 1024, 2048)):
        shapes |= _layer(f"neck.lateral_convs.{level}.conv", 256, channels, 1, 1)
        shapes |= _layer(f"neck.fpn_convs.{level}.conv", 256, 256, 3, 3)
    shapes |= _layer("rpn_head.rpn_conv", 256, 256, 3, 3) | _layer("rpn_head.rpn_cls", 3, 256, 1, 1)
    shapes |= _layer("rpn_head.rpn_reg", 12, 256, 1, 1)
    roi = "roi_head." if version == 2 else ""
    background = 1 if version == 1 else 0  # version 1 gives background offsets and a mask
    for stage in ("",) if kind == "mask_rcnn" else ("0.", "1.", "2."):
        box, mask = f"{roi}bbox_head.{stage}", f"{roi}mask_head.{stage}"
        shapes |= _layer(f"{box}shared_fcs.0", 1024, 256 * 49) | _layer(f"{box}shared_fcs.1", 1024, 1024)
        shapes |= _layer(f"{box}fc_cls", classes + 1, 1024)
        shapes |= _layer(f"{box}fc_reg", 4 if stage else 4 * (classes + background), 1024)
        for number in range(4):
            shapes |= _layer(f"{mask}convs.{number}.conv", 256, 256, 3, 3)
        shapes |= _layer(f"{mask}upsample", 256, 256, 2, 2)
        shapes |= _layer(f"{mask}conv_logits", classes + background, 256, 1, 1)
        if kind == "htc" and (version == 1 or stage != "0."):
            shapes |= _layer(f"{mask}conv_res.conv", 256, 256, 1, 1)
    if kind == "htc":
        for level in range(5):
            shapes |= _layer(f"{roi}semantic_head.lateral_convs.{level}.conv", 256, 256, 1, 1)
        for number in range(4):
            shapes |= _layer(f"{roi}semantic_head.convs.{number}.conv", 256, 256, 3, 3)
        shapes |= _layer(f"{roi}semantic_head.conv_embedding.conv", 256, 256, 1, 1)
        shapes |= _layer(f"{roi}semantic_head.conv_logits", 183, 256, 1, 1)
    return shapes


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Rising numbers, so that every tensor's rows differ; quick for tens of millions."""
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(7)
            continue
        size = int(torch.tensor(shape).prod())
        tensors[name] = (torch.arange(size, dtype=torch.float32) % 1013 / 1013 + number).reshape(shape)
    return tensors

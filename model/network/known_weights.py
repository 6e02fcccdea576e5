"""Weights of other projects that `dsg import-weights` understands, where they lie: for `dsg models` and `dsg pull`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownWeights:
    """One file on the web."""

    preset: str
    """What it fills, besides the preset's forms with guidance."""
    project: str
    """What `--from` says."""
    url: str


_TORCHVISION = "https://download.pytorch.org/models"
_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2"
_MMDET = "https://download.openmmlab.com/mmdetection/v2.0"

KNOWN_WEIGHTS = (
    KnownWeights("mask_rcnn_r50_fpn", "torchvision", f"{_TORCHVISION}/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"),
    KnownWeights("mask_rcnn_r50_v2_fpn", "torchvision", f"{_TORCHVISION}/maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"),
    *(
        KnownWeights(preset, "detectron2", f"{_DETECTRON2}/{path}.pkl")
        for preset, path in (
            ("mask_rcnn_r50_fpn", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217"),
            ("mask_rcnn_r101_fpn", "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72"),
            (
                "mask_rcnn_x101_32x8d_fpn",
                "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x/139653917/model_final_2d9806",
            ),
            ("mask_rcnn_r50_dcn_fpn", "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5/144998336/model_final_821d0b"),
            ("cascade_mask_rcnn_r50_fpn", "Misc/cascade_mask_rcnn_R_50_FPN_3x/144998488/model_final_480dd8"),
        )
    ),
    *(
        KnownWeights(preset, "mmdet", f"{_MMDET}/{path}.pth")
        for preset, path in (
            (
                "cascade_mask_rcnn_r50_fpn",
                "cascade_rcnn/cascade_mask_rcnn_r50_fpn_1x_coco/cascade_mask_rcnn_r50_fpn_1x_coco_20200203-9d4dcb24",
            ),
            ("htc_r50_fpn", "htc/htc_r50_fpn_1x_coco/htc_r50_fpn_1x_coco_20200317-7332cf16"),
            ("htc_r101_fpn", "htc/htc_r101_fpn_20e_coco/htc_r101_fpn_20e_coco_20200317-9b41b48f"),
        )
    ),
)


def weights_for(preset: str) -> list[KnownWeights]:
    """Files that fill a preset, those of its plain counterpart included."""
    plain = preset.replace("cascade_dsg_", "cascade_mask_rcnn_").replace("htc_dsg_", "htc_")
    if plain.startswith("dsg_"):
        plain = plain.replace("dsg_", "mask_rcnn_", 1)
    return [known for known in KNOWN_WEIGHTS if known.preset == plain]

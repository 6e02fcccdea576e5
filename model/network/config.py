"""Every number of a network, in one frozen dataclass. A preset is one of these; an override replaces one field."""

from dataclasses import dataclass, fields

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of ImageNet's photos, RGB in 0..1: what most backbones were trained with."""
RESNETS = ("resnet50", "resnet101", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d")
BACKBONES = (*RESNETS, "lite0", "lite2")
SEMANTIC = ("off", "instances", "stuff")
FourNumbers = tuple[float, float, float, float]


@dataclass(frozen=True)
class DetectorConfig:
    """What is built, how it is trained and how its raw outputs become detections.

    Defaults are the paper's (section 4.1 and the code base it names); presets change what their backbone needs.
    """

    backbone: str
    """One of `BACKBONES`; ignored when `build` is given a module."""
    num_classes: int = 80
    """Foreground classes; heads have one output more, index 0 is background."""

    # --- sizes of the parts
    channels: int = 256
    """Channels of the feature pyramid and of every convolution in the heads."""
    box_head_width: int = 1024
    """Width of the two fully connected layers of the box head."""
    norm_eps: float = 1e-5
    """Epsilon of the frozen batch norms."""
    frozen_stages: int = 2
    """Stages of a ResNet that are not trained: 2 = stem and first stage, as in the paper's code base; 0 = train all.
    For the Lite networks the number of blocks (after the stem) that are not trained."""
    stride_in_1x1: bool = False
    """Strides of a ResNet sit in the first 1x1 convolution of a block, as in MSRA's weights; False: in the 3x3."""
    dcn: bool = False
    """Deformable convolutions in stages 3 to 5 of a ResNet or ResNeXt."""
    dcn_modulated: bool = False
    """With `dcn`: the second version, whose sampling points have weights, too."""
    normalised_heads: bool = False
    """torchvision's second recipe: batch norm in pyramid, box and mask head, four convolutions and one fully connected
    layer in the box head, two convolutions in the RPN."""
    panet: bool = False
    """PANet: a bottom-up path on the pyramid, and RoI features from all its levels."""
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in 0..1."""
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    """Divides RGB in 0..1 after the mean is subtracted."""

    # --- the paper's designs (Table 1); all off is Mask R-CNN
    mrpn: bool = False
    """mRPN: proposals carry class-agnostic masks (section 3.2). Needed by the other four."""
    fuse_mask: bool = False
    """F_M: mask proposal features are added to the mask head's input (section 3.3)."""
    sgra_box: bool = False
    """SgRA_B: proposal masks guide the box head's RoI features (section 3.4)."""
    fuse_box: bool = False
    """F_B: mask proposal features are added to the box head's input (section 3.3)."""
    sgra_mask: bool = False
    """SgRA_M: proposal masks guide the mask head's RoI features; the paper tries and rejects it."""
    fuse_kernel: int = 3
    """Kernel of the fusion convolutions: 3 gives the sizes of Table 1, 1 is what the text says."""
    fuse_activation: bool = True
    """ReLU after the fusion convolution."""
    detach_guidance: bool = False
    """Keep the box loss from reaching the mask proposal network through the guidance."""

    # --- anchors and proposals
    anchor_sizes: tuple[tuple[float, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    """Square roots of anchor areas, pixels, per level P2..P6."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width."""
    anchor_rounding: bool = False
    """Round base anchors to whole pixels (torchvision does)."""
    anchor_centre: float = 0.0
    """Where in its cell an anchor is centred, in cells: 0 the top left corner, 0.5 the middle (mmdetection v1)."""
    anchor_strides_from_grid: bool = False
    """Stride of a level = padded size // grid size, as torchvision has it (61 instead of 64 at 800 pixels)."""
    rpn_iou_positive: float = 0.7
    rpn_iou_negative: float = 0.3
    rpn_samples: int = 256
    """Anchors an image in the RPN's loss, at most half of them positive."""
    rpn_smooth_l1_beta: float = 1.0 / 9.0
    rpn_candidates_train: int = 2000
    """Best anchors of each level that enter NMS in training."""
    rpn_candidates: int = 1000
    """Best anchors of each level that enter NMS at test time."""
    rpn_nms_iou: float = 0.7
    rpn_min_size: float = 1e-3
    """Proposals with a side below this, pixels, are dropped."""
    proposals_train: int = 2000
    """Proposals an image in training, before ground truth is added."""
    proposals: int = 1000
    """Proposals an image at test time."""

    # --- RoI features
    roi_aligned: bool = True
    """Half-pixel RoI coordinates; False is torchvision's detectors' convention."""
    roi_sampling_ratio: int = 2
    """Sampling points a side of each RoI bin."""
    box_pool: int = 7
    mask_pool: int = 14
    """Sides of the pooled features; masks come out twice as large as `mask_pool`."""
    mask_per_class: bool = True
    """One mask output for each class, as in Mask R-CNN; False: one for all, for data with few masks of most classes
    (Mask R-CNN, section 4.1, finds the two nearly equal where masks are many)."""

    # --- heads
    roi_samples: int = 512
    """RoIs an image in the heads' losses."""
    roi_positive_fraction: float = 0.25
    roi_iou_positive: float = 0.5
    box_delta_weights: FourNumbers = (10.0, 10.0, 5.0, 5.0)
    box_smooth_l1_beta: float = 1.0
    ignore_overlap: float = 0.5
    """An anchor or RoI with at least this share of its area inside a crowd region is no negative."""

    mask_iou: bool = False
    """Mask Scoring R-CNN: a head that foretells the overlap of masks with the truth; scores are multiplied by it."""

    # --- cascade; lists have an entry a stage
    cascade: bool = False
    """Several stages, each starting from the boxes of the one before it, with class-agnostic offsets."""
    stage_ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    """Positive from this overlap on, negative below."""
    stage_delta_weights: tuple[FourNumbers, ...] = (
        (1 / 0.1, 1 / 0.1, 1 / 0.2, 1 / 0.2),
        (1 / 0.05, 1 / 0.05, 1 / 0.1, 1 / 0.1),
        (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067),
    )
    """One over the standard deviations of the offsets."""
    stage_class_loss_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    stage_box_loss_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    stage_mask_loss_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    score_stages: int = 3
    """How many of the last stages have their class scores averaged."""
    average_probabilities: bool = False
    """Average the stages' probabilities (detectron2) instead of their logits (mmdetection)."""
    mask_stages: int = 3
    """How many of the last stages predict the masks that are averaged."""
    interleaved: bool = False
    """HTC: a stage's mask head works on the boxes that its box head has refined, and takes up the features of the mask
    heads before it. With `mrpn` every cascade does so (paper, Eq. 3)."""
    guidance_per_class: bool = True
    """With `mrpn`: stages guide with the mask of the class they predict; False: with a mask of one class (DSC)."""
    semantic: str = "off"
    """Semantic branch of HTC, whose features are added to those of the RoIs: off; instances: learned from the instances
    painted into a map, for data without stuff; stuff: learned from maps that come with the data."""
    semantic_classes: int = 183
    """Values in the maps with `semantic="stuff"`; 183 are COCO's things and stuff. 255 is ignored."""
    semantic_loss_weight: float = 0.2

    # --- detections
    score_threshold: float = 0.001
    """Floor of a detection's score (paper, section 4.1)."""
    nms_iou: float = 0.5
    nms_candidates: int = 4096
    """Best (RoI, class) pairs of an image that enter NMS; one in 30 of these is ever reached."""
    min_box_size: float = 1e-2
    """Detections with a side below this, pixels, are dropped."""
    max_detections: int = 100

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {self.backbone!r}")
        needs_mrpn = [f for f in ("fuse_mask", "sgra_box", "fuse_box", "sgra_mask") if getattr(self, f)]
        if needs_mrpn and not self.mrpn:
            raise ValueError(f"{', '.join(needs_mrpn)} need mrpn=True: they use what the mask proposals give")
        if self.fuse_kernel not in (1, 3):
            raise ValueError(f"fuse_kernel must be 3 or 1, got {self.fuse_kernel!r}")
        if self.dcn and self.backbone not in RESNETS:
            raise ValueError(f"dcn is there for {', '.join(RESNETS)}, not for {self.backbone}")
        if self.dcn_modulated and not self.dcn:
            raise ValueError("dcn_modulated needs dcn=True")
        self._check_cascade()
        if len(self.anchor_sizes) != 5:
            raise ValueError(f"anchor_sizes must name 5 levels (P2 to P6), got {len(self.anchor_sizes)}")
        if len({len(sizes) for sizes in self.anchor_sizes}) != 1:
            raise ValueError("anchor_sizes must name equally many sizes on each level: the RPN's head is shared")
        for name in (
            "num_classes",
            "channels",
            "box_head_width",
            "proposals",
            "proposals_train",
            "max_detections",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0.0 <= self.score_threshold <= 1.0:
            raise ValueError(f"score_threshold must be in 0..1, got {self.score_threshold!r}")

    def _check_cascade(self) -> None:
        if self.semantic not in SEMANTIC:
            raise ValueError(f"semantic must be one of {', '.join(SEMANTIC)}, got {self.semantic!r}")
        if not self.cascade:
            alone = [name for name in ("interleaved",) if getattr(self, name)]
            alone += ["semantic"] * (self.semantic != "off")
            if alone:
                raise ValueError(f"{', '.join(alone)} needs cascade=True")
            return
        stages = len(self.stage_ious)
        for name in (
            "stage_delta_weights",
            "stage_class_loss_weights",
            "stage_box_loss_weights",
            "stage_mask_loss_weights",
        ):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {stages} stages in stage_ious")
        for name in ("score_stages", "mask_stages"):
            if not 1 <= getattr(self, name) <= stages:
                raise ValueError(f"{name} must be in 1..{stages}, got {getattr(self, name)!r}")
        single = [name for name in ("sgra_mask", "mask_iou", "normalised_heads") if getattr(self, name)]
        if single:
            raise ValueError(f"{', '.join(single)} is there for one stage only: set cascade=False")
        if not self.guidance_per_class and not self.mrpn:
            raise ValueError("guidance_per_class=False needs mrpn=True: without it no mask guides")


FIELD_NAMES = tuple(field.name for field in fields(DetectorConfig))

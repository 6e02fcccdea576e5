"""Which networks can be exported to what, known before a network is trained."""

from dsg.export.contract import Format
from dsg.model.network.config import DetectorConfig


def refusal(config: DetectorConfig, kind: Format) -> str | None:
    """Why a network of this configuration has no export of this kind, in words, or None where it has one."""
    if kind is Format.ONNX and config.roi_sampling_ratio <= 0 and (config.sgra_box or config.sgra_mask):
        return (
            "shape-guided RoI features with adaptive sampling (roi_sampling_ratio 0) have no ONNX form; use 1 or more"
        )
    return None


def refusals(config: DetectorConfig) -> dict[str, str]:
    """The formats that a network of this configuration has no export to, by name, and why."""
    return {kind.value: reason for kind in Format if (reason := refusal(config, kind)) is not None}

"""`dsg predict`: pictures in, COCO results and overlays out."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsg.cli.loading import (
    DEFAULT_MODEL,
    DeviceOption,
    ModelOption,
    PrecisionOption,
    ProposalsOption,
    load_predictor,
    pictures_in,
)
from dsg.cli.progress import progress

if TYPE_CHECKING:
    from dsg.model.network.predictor import Predictor


def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.", show_default=False)],
    model: ModelOption = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder for predictions.json and the overlays.")] = Path("runs/predict"),
    score_threshold: Annotated[
        float | None, typer.Option(help="Lowest score, 0 to 1; by default the model's own.")
    ] = None,
    max_detections: Annotated[
        int | None, typer.Option(help="Most objects of a picture; by default the model's own.")
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = "auto",
    proposals: ProposalsOption = None,
) -> None:
    """Find the objects in pictures.

    Writes predictions.json, a COCO results file whose image_id counts the pictures from 1 in the order given
    (each entry also names its file), and a PNG of every picture with its masks drawn on it.
    """
    pictures = pictures_in(images)
    predictor = load_predictor(model, device, precision, proposals)
    predictor.limits(score_threshold, max_detections)  # a wrong number ends here, before the first picture
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    with progress("pictures") as advance:
        for image_id, path in enumerate(pictures, start=1):
            overlay = out / _overlay_name(path, taken)
            found = _one_picture(predictor, path, overlay, image_id, score_threshold, max_detections)
            results += [{**result, "file_name": str(path)} for result in found]
            advance(image_id, len(pictures))
    (out / "predictions.json").write_text(json.dumps(results), encoding="utf-8")
    typer.echo(f"{out / 'predictions.json'}: {len(results)} objects in {len(pictures)} pictures; overlays beside it")


def _one_picture(
    predictor: "Predictor",
    path: Path,
    overlay: Path,
    image_id: int,
    score_threshold: float | None,
    max_detections: int | None,
) -> list[dict[str, Any]]:
    """COCO results of one picture, in falling score; writes its overlay."""
    from dsg.model.network.pixels import picture_array
    from dsg.service.overlay import draw_instances

    pixels = picture_array(path)  # uint8 [H, W, 3]
    (found,) = predictor.predict([pixels], score_threshold, max_detections)
    results = found.to_coco(image_id, predictor.info.category_ids)
    names = {category.id: category.name for category in predictor.info.categories}
    draw_instances(pixels, results, names).save(overlay)
    return results


def _overlay_name(path: Path, taken: Counter[str]) -> str:
    """The picture's own name, numbered where pictures of several folders share it."""
    taken[path.stem] += 1
    return f"{path.stem}.png" if taken[path.stem] == 1 else f"{path.stem}_{taken[path.stem]}.png"

"""`dsg eval`: COCO's AP of a model on pictures, or of a file of predictions."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsg.cli.loading import DeviceOption, PrecisionOption, ProposalsOption, load_predictor
from dsg.cli.progress import progress

if TYPE_CHECKING:
    from dsg.model.network.checkpoint import CheckpointInfo
    from dsg.model.network.predictor import Predictor


def evaluate(
    annotations: Annotated[Path, typer.Option(help="What is right: a COCO file.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="A name that `dsg models` lists, or a file.", show_default=False)
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the pictures.", show_default="images/ beside the annotations"),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="COCO results to evaluate in place of a model.", show_default=False)
    ] = None,
    max_detections: Annotated[
        int | None,
        typer.Option(
            help="Detections of each class in a picture that count.",
            show_default="the larger of 100 and the fullest picture's objects",
        ),
    ] = None,
    huddled: Annotated[
        bool,
        typer.Option("--huddled", help="Also AP of the pictures whose objects overlap (the paper's Table 4)."),
    ] = False,
    set_thresholds: Annotated[
        float | None,
        typer.Option(
            metavar="PRECISION",
            help="Choose the default score threshold of each class so that this share of the detections is right, and"
            " write them into the file that --model names.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.", show_default=False)] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = "auto",
    proposals: ProposalsOption = None,
) -> None:
    """Average precision of boxes and masks over all pictures of the annotations."""
    if (model is None) == (predictions is None):
        raise ValueError("give either --model, which predicts on the pictures, or --predictions, a COCO results file")
    if predictions is not None and images is not None:
        raise ValueError("--images goes with --model; a file of --predictions needs no pictures")
    info = None if set_thresholds is None else _rewritable(model, set_thresholds)
    from dsg.model.training.evaluation import evaluate_results, format_table, max_objects_in_an_image

    if max_detections is None:
        max_detections = max(100, max_objects_in_an_image(annotations))
    if predictions is not None:
        results = _read(predictions)
    else:
        predictor = load_predictor(str(model), device, precision, proposals)
        results = _predict(predictor, annotations, images, max_detections)
    evaluation = evaluate_results(annotations, results, max_detections)
    typer.echo(format_table(evaluation))
    document = evaluation.as_dict()
    if huddled:
        from dsg.model.training.huddled import evaluate_huddled, format_huddled

        rows = evaluate_huddled(annotations, results, max_detections)
        typer.echo("\nAP of boxes / masks where more than T_P of the objects overlap by more than T_O:")
        typer.echo(format_huddled(rows))
        document["huddled"] = [asdict(row) for row in rows]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if info is not None and set_thresholds is not None:
        _set_thresholds(str(model), info, annotations, results, set_thresholds)


def _rewritable(model: str | None, precision: float) -> "CheckpointInfo":
    """The description of the file whose thresholds are to be set; a mistake ends here, before the first picture."""
    from dsg.model.network.checkpoint import read_info
    from dsg.model.network.predictor import shipped_weights

    if model is None:
        raise ValueError("--set-thresholds goes with --model: it writes into the model's file")
    if model in shipped_weights():
        raise ValueError(f"{model} comes with the package and stays as it is: copy its file and give the copy's path")
    if not 0 < precision <= 1:
        raise ValueError(f"--set-thresholds is a share of right detections, above 0 and at most 1, not {precision}")
    return read_info(model)


def _set_thresholds(
    model: str, info: "CheckpointInfo", annotations: Path, results: list[dict[str, Any]], precision: float
) -> None:
    """Choose thresholds on these results, and write them into the model's file."""
    from dsg.model.data.coco import read_coco
    from dsg.model.network.checkpoint import rewrite_info
    from dsg.model.training.thresholds import with_class_thresholds
    from dsg.model.training.validate import matching_ids

    if not results:
        raise ValueError(f"{model} found nothing in these pictures to choose thresholds on; its file stays as it was")
    category_ids = matching_ids(info.categories, read_coco(annotations).categories)
    info = with_class_thresholds(info, annotations, results, category_ids, precision)
    rewrite_info(model, info)
    typer.echo(f"\n{model}: lowest score that is shown by default: {info.threshold_in_words}")


def _read(path: Path) -> list[dict[str, Any]]:
    """A COCO results file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f"{path} is no list of COCO results; each has image_id, category_id, score, and bbox or mask")
    return results


def _predict(
    predictor: "Predictor", annotations: Path, images: Path | None, max_detections: int
) -> list[dict[str, Any]]:
    """COCO results of a model on the pictures of the annotations, at the model's threshold for evaluation."""
    from dsg.model.data.coco import read_coco
    from dsg.model.training.validate import matching_ids, results_of

    data = read_coco(annotations, images)
    cap = predictor.info.max_detections
    if cap < max_detections:
        name = predictor.info.name
        typer.echo(f"{name} gives at most {cap} detections of a picture; {max_detections} would count", err=True)
    done = 0
    with progress("pictures") as advance:

        def count() -> None:
            nonlocal done
            done += 1
            advance(done, len(data.records))

        return results_of(
            predictor,
            data.records,
            matching_ids(predictor.info.categories, data.categories),
            score_threshold=predictor.info.eval_score_threshold,
            max_detections=min(cap, max_detections),
            on_picture=count,
        )

"""`dsg eval`: COCO's AP of a model on pictures, or of a file of predictions."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dsg.cli.loading import DeviceOption, load_predictor
from dsg.cli.progress import progress


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
    out: Annotated[Path | None, typer.Option(help="JSON file to write.", show_default=False)] = None,
    device: DeviceOption = None,
) -> None:
    """Average precision of boxes and masks over all pictures of the annotations."""
    if (model is None) == (predictions is None):
        raise ValueError("give either --model, which predicts on the pictures, or --predictions, a COCO results file")
    if predictions is not None and images is not None:
        raise ValueError("--images goes with --model; a file of --predictions needs no pictures")
    from dsg.model.training.evaluation import evaluate_results, format_table, max_objects_in_an_image

    if max_detections is None:
        max_detections = max(100, max_objects_in_an_image(annotations))
    if predictions is not None:
        results = _read(predictions)
    else:
        results = _predict(str(model), annotations, images, max_detections, device)
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
    model: str, annotations: Path, images: Path | None, max_detections: int, device: str | None
) -> list[dict[str, Any]]:
    """COCO results of a model on the pictures of the annotations, at the model's threshold for evaluation."""
    from dsg.model.data.coco import read_coco
    from dsg.model.training.validate import matching_ids, results_of

    data = read_coco(annotations, images)
    predictor = load_predictor(model, device)
    cap = predictor.info.max_detections
    if cap < max_detections:
        typer.echo(f"{model} gives at most {cap} detections of a picture; {max_detections} would count", err=True)
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

"""What `dsg bench service` measures beside our server, each a process of its own: `python -m dsg.bench.service_peers`.

* `litserve`: the same model behind LitServe with its batching. Its batches are pictures of any shapes; those of one
  shape run together, so that its answers are ours.
* `plain`: the same model behind a FastAPI endpoint and a lock.
* `inprocess`: the same model in a loop, without a server.

All decode with `dsg.service.decode`, and write answers with `dsg.service.encode`.
"""

import argparse
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastapi
import litserve
import uvicorn
from starlette.responses import Response

from dsg.bench.service_processes import WRONG_INPUT
from dsg.export import load
from dsg.model.network.detections import Detections, lowest_of
from dsg.model.network.predictor import Predictor, PreparedImage
from dsg.service.decode import decode_picture
from dsg.service.encode import Answered, coco_document, to_json
from dsg.service.query import SegmentQuery, wanted

_MAX_PIXELS = 64_000_000
_BATCH_WAIT_S = 0.005
_DEFAULTS = SegmentQuery.model_validate({})


def prepare(predictor: Predictor, data: bytes) -> PreparedImage:
    """A file as the network wants it."""
    return predictor.prepare(decode_picture(data, _MAX_PIXELS))


def detect(predictor: Predictor, pictures: Sequence[PreparedImage]) -> list[Detections]:
    """Detections of pictures of any shapes, those of one shape together."""
    threshold = lowest_of(wanted(_DEFAULTS, predictor.info).score_threshold)
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        buckets[picture.padded_size].append(index)
    found: dict[int, Detections] = {}
    for indices in buckets.values():
        found |= zip(indices, predictor.detect([pictures[i] for i in indices], threshold), strict=True)
    return [found[index] for index in range(len(pictures))]


def write(predictor: Predictor, found: Detections) -> bytes:
    """The answer that our server gives by default."""
    info = predictor.info
    # What a served model has beside this is its name.
    return to_json(coco_document([Answered("a.jpg", found)], wanted(_DEFAULTS, info), info, info.name))


class Api(litserve.LitAPI):
    """The model as LitServe runs it."""

    def __init__(self, arguments: argparse.Namespace, **options: Any) -> None:
        super().__init__(**options)
        self._arguments = arguments

    def setup(self, device: str) -> None:
        self._predictor = load(self._arguments.model, device, proposals=self._arguments.proposals)

    def decode_request(self, request: fastapi.Request) -> PreparedImage:
        return prepare(self._predictor, request["image"].file.read())

    def batch(self, inputs: list[PreparedImage]) -> list[PreparedImage]:
        return inputs

    def predict(self, x: list[PreparedImage]) -> list[Detections]:
        return detect(self._predictor, x)

    def unbatch(self, output: list[Detections]) -> list[Detections]:
        return output

    def encode_response(self, output: Detections) -> Response:
        return Response(write(self._predictor, output), media_type="application/json")


def litserve_server(arguments: argparse.Namespace) -> None:
    """Serve for ever."""
    api = Api(arguments, max_batch_size=arguments.max_batch, batch_timeout=_BATCH_WAIT_S, api_path="/segment")
    accelerator = "cuda" if arguments.device.startswith("cuda") else "cpu"
    server = litserve.LitServer(api, accelerator=accelerator, devices=1, timeout=arguments.deadline_s)
    server.run(host="127.0.0.1", port=arguments.port, num_api_servers=1, generate_client_file=False, log_level="error")


def plain_server(arguments: argparse.Namespace) -> None:
    """Serve for ever."""
    predictor = load(arguments.model, arguments.device, proposals=arguments.proposals)
    lock = threading.Lock()
    app = fastapi.FastAPI()

    @app.post("/segment")
    def segment(image: fastapi.UploadFile) -> Response:
        picture = prepare(predictor, image.file.read())
        with lock:
            (found,) = detect(predictor, [picture])
        return Response(write(predictor, found), media_type="application/json")

    @app.get("/health")
    def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="error")


def in_process(arguments: argparse.Namespace) -> None:
    """Print pictures a second of the network with its answers written, and the latency of one picture, as JSON."""
    predictor = load(arguments.model, arguments.device, proposals=arguments.proposals)
    files = [path.read_bytes() for path in sorted(Path(arguments.pictures).iterdir())]
    pictures = [prepare(predictor, data) for data in files]

    def one(turn: int) -> int:
        picture = prepare(predictor, files[turn % len(files)])
        write(predictor, detect(predictor, [picture])[0])
        return 1

    def batch(turn: int) -> int:
        first = turn * arguments.max_batch
        chosen = [pictures[(first + i) % len(pictures)] for i in range(arguments.max_batch)]
        for found in detect(predictor, chosen):
            write(predictor, found)
        return len(chosen)

    result = {"latency_s": 1 / _rate(one, arguments.seconds), "rate": _rate(batch, arguments.seconds)}
    sys.stdout.write(json.dumps(result) + "\n")


def _rate(work: Callable[[int], int], seconds: float) -> float:
    """Pictures a second; `work` ends with the answer written, so that a GPU is done too."""
    work(0)
    done, turn, begin = 0, 0, time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds or turn == 0:
        done += work(turn)
        turn += 1
    return done / took


def main() -> None:
    """Be one of the three."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["litserve", "plain", "inprocess"])
    for name in ("model", "device", "pictures"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--proposals", type=int, default=None)
    parser.add_argument("--deadline-s", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    try:
        {"litserve": litserve_server, "plain": plain_server, "inprocess": in_process}[arguments.what](arguments)
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(WRONG_INPUT)


if __name__ == "__main__":
    main()

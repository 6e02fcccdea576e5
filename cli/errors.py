"""From exceptions to what the shell sees: one line on stderr and an exit code."""

import os
import sys
import traceback

import typer

OK = 0
UNEXPECTED = 1
USER_ERROR = 2
INTERRUPTED = 130

# What the rooms raise for wrong input; their own errors (broken data or checkpoint) derive from ValueError.
_USER_ERRORS = (ValueError, TypeError, OSError)

_EXTRA_OF_PACKAGE = {
    "torch": "torch",
    "torchvision": "torch",
    "fastapi": "serve",
    "uvicorn": "serve",
    "orjson": "serve",
    "pydantic_settings": "serve",
    "prometheus_client": "serve",
    "structlog": "serve",
    "ray": "ray",
    "faster_coco_eval": "train",
    "tensorboard": "train",
    "pycocotools": "test",
    "httpx": "client",
    "litserve": "bench",
    "matplotlib": "bench",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "onnx",
}


def report(error: BaseException) -> int:
    """Say on stderr, in one line, what went wrong; DSG_DEBUG=1 adds the traceback.

    Returns:
        the exit code: 2 for a mistake of the user, 130 for Ctrl-C, 1 for a fault of ours.
    """
    if os.environ.get("DSG_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        typer.echo("dsg: interrupted", err=True)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # The reader (`| head`) has left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    usage = getattr(error, "format_message", None)  # a usage error of typer: its class moved between versions
    if usage is not None:
        return _say(usage(), USER_ERROR)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        if package in _EXTRA_OF_PACKAGE:
            install = f"pip install 'dsg[{_EXTRA_OF_PACKAGE[package]}]'"
            return _say(f"this needs the package {package}; install it with: {install}", USER_ERROR)
    # A package that is there and will not do says so itself.
    if isinstance(error, _USER_ERRORS) or (isinstance(error, ImportError) and error.name in _EXTRA_OF_PACKAGE):
        return _say(_one_line(error), USER_ERROR)
    what = f"{type(error).__name__}: {_one_line(error)}"
    return _say(f"{what} (a fault of dsg; DSG_DEBUG=1 shows the traceback)", UNEXPECTED)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return " ".join(str(error).split()) or type(error).__name__


def _say(line: str, code: int) -> int:
    typer.echo(f"dsg: error: {line}", err=True)
    return code

"""`dsg serve`: the HTTP service."""

from typing import Annotated, Any, Literal

import typer


def serve(
    model: Annotated[str | None, typer.Option(help="Name or file of the model; else DSG_MODEL.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; else DSG_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; else DSG_PORT.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; else DSG_DEVICE.")] = None,
    devices: Annotated[
        str | None, typer.Option(help="all GPUs ('all') or some ('cuda:0,cuda:1'), with one queue; else DSG_DEVICES.")
    ] = None,
    engine: Annotated[
        Literal["own", "ray"] | None, typer.Option(help="own: this process; ray: replicas behind Ray Serve.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, such as auto or HOST:6379; else Ray is started here.")
    ] = None,
    replicas: Annotated[
        str | None, typer.Option(help="Servers that Ray runs: a count, or least-most such as 1-8; else one a GPU.")
    ] = None,
) -> None:
    """Start the server. Every other setting is an environment variable DSG_*; the README lists them."""
    from pydantic import ValidationError

    from dsg.service.run import serve as run_server
    from dsg.service.settings import Settings

    given: dict[str, Any] = {"model": model, "host": host, "port": port, "device": device, "devices": devices}
    given |= {"engine": engine, "ray_address": address, "replicas": replicas}
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        wrong = [
            f"DSG_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}".removeprefix("DSG_: ") for e in error.errors()
        ]
        raise ValueError(f"wrong setting, {'; '.join(wrong)}") from None
    run_server(settings)

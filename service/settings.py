"""Every number that an operator may set: environment variables `DSG_*`, or arguments in code."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dsg.service.setting_checks import (
    A_DAY_MS,
    Count,
    Host,
    Key,
    Keys,
    Milliseconds,
    Names,
    Origins,
    Size,
    Threads,
    above,
    parts,
)

# Pillow warns of a decompression bomb above this many pixels; a higher cap would have to switch its guard
# off.
_PILLOW_GUARD_PIXELS = 89_478_485


class Settings(BaseSettings):
    """Settings of one server process.

    `Settings()` reads the environment (`DSG_PORT=9000`); arguments win over it. An empty variable counts as
    unset. Each description names the unit and the default.
    """

    model_config = SettingsConfigDict(env_prefix="DSG_", env_ignore_empty=True, extra="ignore", frozen=True)

    host: Host = Field("127.0.0.1", description="address to listen on (default 127.0.0.1: this machine alone)")
    port: int = Field(8000, ge=0, le=65535, description="TCP port (default 8000; 0 takes a free one)")
    device: Names | None = Field(
        None, description="torch device, such as cpu or cuda:0 (default: the best one there is)"
    )
    devices: Names | None = Field(
        None,
        description="in place of DSG_DEVICE: several devices, comma separated, or all for every GPU; they share one "
        "queue (default: DSG_DEVICE alone)",
    )
    workers: Literal["thread", "process"] | None = Field(
        None,
        description="what runs a device: a thread of the server or a process of its own (default: a process for a "
        "GPU or where there are several devices, else a thread)",
    )
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="what checkpoints compute in; exported files have their own (default auto: float16 on a GPU, "
        "float32 on a CPU)",
    )
    proposals: Count | None = Field(
        None,
        description="regions of a picture that the heads of checkpoints look at, a count; fewer are quicker and may "
        "miss what is crowded (default: the checkpoint's own)",
    )
    model: Names = Field(
        "dsg_lite0_coco",
        description="models to load, names or paths, comma separated; the first is the one that answers "
        "requests without ?model= (default dsg_lite0_coco)",
    )
    model_dir: Path | None = Field(
        None,
        description="folder of checkpoints and exported files for DSG_MODEL and /models/reload (default: none)",
    )
    reload_key: Key | None = Field(
        None,
        description="key of POST /models/reload, at least 16 characters, sent as 'Authorization: Bearer KEY' "
        "(default: none, and reloading is off)",
    )
    api_keys: Keys | None = Field(
        None,
        description="keys of clients, comma separated, each at least 16 characters; /segment and /models then want "
        "one as 'Authorization: Bearer KEY' or 'X-API-Key: KEY' (default: none, and no key is asked for)",
    )
    cors_origins: Origins | None = Field(
        None,
        description="origins whose pages may call this server, comma separated, such as https://example.org; * for "
        "all (default: none)",
    )
    tracing: bool = Field(
        False,
        description="send OpenTelemetry spans, as OTEL_* variables say; needs the extra tracing (default False)",
    )

    engine: Literal["own", "ray"] = Field(
        "own",
        description="what runs servers: own, this process; ray, replicas behind Ray Serve's proxy, on this machine or "
        "a cluster, one for each GPU; needs the extra ray (default own)",
    )
    ray_address: str | None = Field(
        None,
        description="of a Ray cluster, such as auto, HOST:6379 or ray://HOST:10001 (default: none, and Ray is started "
        "on this machine, and ends with the server)",
    )
    replicas: Annotated[str, StringConstraints(pattern=r"^[1-9]\d{0,3}(-[1-9]\d{0,3})?$")] | None = Field(
        None,
        description="servers that Ray runs: a count, or a least and a most between which it follows the load, such as "
        "1-8 (default: 1 to the number of GPUs there are)",
    )

    max_bytes: Size = Field(
        32_000_000,
        description="largest request body in bytes, all its pictures together (default 32000000)",
    )
    max_pixels: int = Field(
        64_000_000,
        ge=1,
        le=_PILLOW_GUARD_PIXELS,
        description=f"largest picture in pixels, at most {_PILLOW_GUARD_PIXELS} (default 64000000)",
    )
    max_pictures: Count = Field(32, description="most pictures in one request, a count (default 32)")
    max_queue: Count = Field(
        128,
        description="most pictures accepted and not answered yet, a count; one more gets 429 (default 128)",
    )
    max_pixels_in_flight: Size = Field(
        1_000_000_000,
        description="most pixels of pictures accepted and not answered yet; more get 429 (default 1000000000)",
    )
    max_bytes_in_flight: Size = Field(
        512_000_000,
        description="most bytes of bodies read and not decoded yet; more get 429 (default 512000000)",
    )
    max_batch: Count = Field(8, description="most pictures run on a device together, a count (default 8)")
    # Four pictures of 800x1333: eight at once were seen to gain 4 % on an H100, and each waits twice as long.
    max_batch_pixels: Size = Field(
        4_500_000,
        description="most pixels run on a device together, after resize and padding; a single larger picture runs "
        "alone (default 4500000)",
    )
    ageing_ms: Milliseconds = Field(
        200,
        description="waiting time that counts as much as a full batch, in milliseconds: no picture is overtaken by "
        "one that came more than this later (default 200)",
    )
    deadline_ms: Milliseconds = Field(
        60_000,
        description="time from a request's headers to its answer in milliseconds, after which it gets 504; "
        "X-Timeout-Ms shortens it for one request (default 60000)",
    )
    body_timeout_ms: Milliseconds = Field(
        30_000,
        description="time to send a body in milliseconds, then 408, or to take nothing of an answer (default 30000)",
    )
    header_timeout_ms: Milliseconds = Field(
        10_000,
        description="time to send a request's headers in milliseconds, then the connection is closed (default 10000)",
    )
    drain_ms: int = Field(
        30_000,
        ge=0,
        le=A_DAY_MS,
        description="time for requests in flight to finish after SIGTERM in milliseconds; the end itself takes up to "
        "3 s more (default 30000)",
    )
    decode_workers: Threads | None = Field(
        None,
        description="threads that decode and resize pictures, a count (default: half the CPU's cores, at least 2)",
    )
    encode_workers: Threads | None = Field(
        None,
        description="threads that write answers, a count (default: half the CPU's cores, at least 2)",
    )

    @model_validator(mode="after")
    def _they_go_together(self) -> "Settings":
        if self.max_pictures > self.max_queue:
            raise ValueError(above("max_pictures", self.max_pictures, "max_queue", self.max_queue))
        for what in ("max_pixels", "max_bytes"):
            one, all_ = getattr(self, what), getattr(self, f"{what}_in_flight")
            if one > all_:
                raise ValueError(above(what, one, f"{what}_in_flight", all_))
        if self.device is not None and self.devices is not None:
            raise ValueError("DSG_DEVICE and DSG_DEVICES are both set; set one of them")
        if self.engine == "own":
            if self.ray_address is not None or self.replicas is not None:
                raise ValueError(
                    "DSG_RAY_ADDRESS and DSG_REPLICAS are for the engine ray; set DSG_ENGINE=ray, or leave them out"
                )
            # With Ray it is a folder of the machines that replicas run on.
            if self.model_dir is not None and not os.path.isdir(self.model_dir):
                raise ValueError(f"DSG_MODEL_DIR ({self.model_dir}) is no folder that can be read")
            return self
        if self.devices is not None:
            raise ValueError(
                "DSG_DEVICES is for the engine own; with ray each replica has one, and DSG_REPLICAS says how many"
            )
        if (self.device or "").startswith("cuda:"):
            raise ValueError(f"DSG_DEVICE is {self.device}, and with ray each replica sees one GPU alone: say cuda")
        if self.replica_range[0] > self.replica_range[1]:
            raise ValueError(f"DSG_REPLICAS is {self.replicas}: the least comes first")
        return self

    @property
    def replica_range(self) -> tuple[int, int]:
        """Least and most replicas that `replicas` asks for."""
        least, _, most = (self.replicas or "1").partition("-")
        return int(least), int(most or least)

    @property
    def models(self) -> list[str]:
        """Names or paths of the models to load, the default one first."""
        return parts(self.model)

    @property
    def decode_threads(self) -> int:
        """Threads that decode and resize pictures."""
        return self.decode_workers or _half_the_cores()

    @property
    def encode_threads(self) -> int:
        """Threads that write answers."""
        return self.encode_workers or _half_the_cores()

    @property
    def keys(self) -> list[str]:
        """Keys of clients; empty where none is asked for."""
        return parts(self.api_keys.get_secret_value()) if self.api_keys else []

    @property
    def origins(self) -> list[str]:
        """Origins whose pages may call this server."""
        return parts(self.cors_origins or "")


def _half_the_cores() -> int:
    return max(2, (os.cpu_count() or 2) // 2)

"""Every number that an operator may set: environment variables `DSG_*`, or arguments in code."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, StringConstraints, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

# Pillow warns of a decompression bomb above this many pixels; a higher cap would have to switch its guard
# off.
_PILLOW_GUARD_PIXELS = 89_478_485


class Settings(BaseSettings):
    """Settings of one server process.

    `Settings()` reads the environment (`DSG_PORT=9000`); arguments win over it. An empty variable counts as
    unset. Each description names the unit and the default.
    """

    model_config = SettingsConfigDict(env_prefix="DSG_", env_ignore_empty=True, extra="ignore", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on (default 127.0.0.1: this machine alone)")
    port: int = Field(8000, ge=0, le=65535, description="TCP port (default 8000; 0 takes a free one)")
    device: str | None = Field(None, description="torch device, such as cpu or cuda:0 (default: the best one there is)")
    devices: str | None = Field(
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
    proposals: int | None = Field(
        None,
        ge=1,
        description="regions of a picture that the heads of checkpoints look at, a count; fewer are quicker and may "
        "miss what is crowded (default: the checkpoint's own)",
    )
    model: str = Field(
        "dsg_lite0_coco",
        description="models to load, names or paths, comma separated; the first is the one that answers "
        "requests without ?model= (default dsg_lite0_coco)",
    )
    model_dir: Path | None = Field(
        None,
        description="folder of checkpoints and exported files for DSG_MODEL and /models/reload (default: none)",
    )
    reload_key: Annotated[SecretStr, StringConstraints(min_length=16)] | None = Field(
        None,
        description="key of POST /models/reload, at least 16 characters, sent as 'Authorization: Bearer KEY' "
        "(default: none, and reloading is off)",
    )
    api_keys: SecretStr | None = Field(
        None,
        description="keys of clients, comma separated, each at least 16 characters; /segment and /models then want "
        "one as 'Authorization: Bearer KEY' or 'X-API-Key: KEY' (default: none, and no key is asked for)",
    )
    cors_origins: str | None = Field(
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

    max_bytes: int = Field(
        32_000_000,
        ge=1,
        description="largest request body in bytes, all its pictures together (default 32000000)",
    )
    max_pixels: int = Field(
        64_000_000,
        ge=1,
        le=_PILLOW_GUARD_PIXELS,
        description=f"largest picture in pixels, at most {_PILLOW_GUARD_PIXELS} (default 64000000)",
    )
    max_pictures: int = Field(32, ge=1, description="most pictures in one request, a count (default 32)")
    max_queue: int = Field(
        128,
        ge=1,
        description="most pictures accepted and not answered yet, a count; one more gets 429 (default 128)",
    )
    max_pixels_in_flight: int = Field(
        1_000_000_000,
        ge=1,
        description="most pixels of pictures accepted and not answered yet; more get 429 (default 1000000000)",
    )
    max_bytes_in_flight: int = Field(
        512_000_000,
        ge=1,
        description="most bytes of bodies read and not decoded yet; more get 429 (default 512000000)",
    )
    max_batch: int = Field(8, ge=1, description="most pictures run on a device together, a count (default 8)")
    # Four pictures of 800x1333: eight at once were seen to gain 4 % on an H100, and each waits twice as long.
    max_batch_pixels: int = Field(
        4_500_000,
        ge=1,
        description="most pixels run on a device together, after resize and padding; a single larger picture runs "
        "alone (default 4500000)",
    )
    ageing_ms: int = Field(
        200,
        ge=1,
        description="waiting time that counts as much as a full batch, in milliseconds: no picture is overtaken by "
        "one that came more than this later (default 200)",
    )
    deadline_ms: int = Field(
        60_000,
        ge=1,
        description="time from a request's headers to its answer in milliseconds, after which it gets 504; "
        "X-Timeout-Ms shortens it for one request (default 60000)",
    )
    body_timeout_ms: int = Field(
        30_000,
        ge=1,
        description="time to send a body in milliseconds, then 408 (default 30000)",
    )
    header_timeout_ms: int = Field(
        10_000,
        ge=1,
        description="time to send a request's headers in milliseconds, then the connection is closed (default 10000)",
    )
    drain_ms: int = Field(
        30_000,
        ge=0,
        description="time for requests in flight to finish after SIGTERM in milliseconds (default 30000)",
    )
    decode_workers: int | None = Field(
        None,
        ge=1,
        description="threads that decode and resize pictures, a count (default: half the CPU's cores, at least 2)",
    )
    encode_workers: int | None = Field(
        None, ge=1, description="threads that write answers, a count (default: half the CPU's cores, at least 2)"
    )

    @field_validator("model")
    @classmethod
    def _some_model(cls, value: str) -> str:
        if not all(part.strip() for part in value.split(",")):
            raise ValueError("name at least one model, and no empty one between commas")
        return value

    @field_validator("api_keys")
    @classmethod
    def _long_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and min(len(part.strip()) for part in value.get_secret_value().split(",")) < 16:
            raise ValueError("each key has at least 16 characters")
        return value

    @model_validator(mode="after")
    def _they_go_together(self) -> "Settings":
        if self.max_pictures > self.max_queue:
            raise ValueError(f"max_pictures ({self.max_pictures}) above max_queue ({self.max_queue}): it never fits")
        for what in ("pixels", "bytes"):
            one, all_ = getattr(self, f"max_{what}"), getattr(self, f"max_{what}_in_flight")
            if one > all_:
                raise ValueError(f"max_{what} ({one}) above max_{what}_in_flight ({all_}): it never fits")
        if self.device is not None and self.devices is not None:
            raise ValueError("device and devices are both set; set one of them")
        if self.engine == "own" and (self.ray_address is not None or self.replicas is not None):
            raise ValueError("ray_address and replicas are for the engine ray; set engine to ray, or leave them out")
        if self.engine == "ray" and self.devices is not None:
            raise ValueError("devices is for the engine own; with ray each replica has one, and replicas says how many")
        if self.engine == "ray" and (self.device or "").startswith("cuda:"):
            raise ValueError(f"device is {self.device}, and with ray each replica sees one GPU alone: say cuda")
        if self.replicas is not None and self.replica_range[0] > self.replica_range[1]:
            raise ValueError(f"replicas is {self.replicas}: the least comes first")
        return self

    @property
    def replica_range(self) -> tuple[int, int]:
        """Least and most replicas that `replicas` asks for."""
        least, _, most = (self.replicas or "1").partition("-")
        return int(least), int(most or least)

    @property
    def models(self) -> list[str]:
        """Names or paths of the models to load, the default one first."""
        return [part.strip() for part in self.model.split(",")]

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
        return _parts(self.api_keys.get_secret_value()) if self.api_keys else []

    @property
    def origins(self) -> list[str]:
        """Origins whose pages may call this server."""
        return _parts(self.cors_origins or "")


def _half_the_cores() -> int:
    return max(2, (os.cpu_count() or 2) // 2)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]

"""The HTTP service: pictures in, COCO instance masks out."""

from dsg.service.app import create_app
from dsg.service.run import ServiceError, serve
from dsg.service.settings import Settings

__all__ = ["ServiceError", "Settings", "create_app", "serve"]

"""What `dsg predict` takes from the service: drawing, which must work where no server is installed."""

import subprocess
import sys

PROGRAM = """
import sys
for name in ("fastapi", "starlette", "uvicorn", "pydantic", "structlog", "python_multipart", "prometheus_client"):
    sys.modules[name] = None  # an import of it fails, as if it were not installed
import numpy as np
from dsg.service.overlay import draw_instances
print(draw_instances(np.zeros((20, 30, 3), np.uint8), [], {}).size)
"""


def test_overlays_need_nothing_of_the_server() -> None:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "(30, 20)\n"), ran.stderr

"""A served model's own copy of its file, from which the workers load it, also those that are started again.

Under the file's own name there may be something else by then: the next model, half of one, or nothing.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import structlog

_log = structlog.get_logger("dsg.service")


class ModelCopy:
    """Where a model is loaded from as long as it is served.

    Args:
        source: a path; a name is left as it is, and so is a path where there is no room for a copy.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        """What the operator calls it."""
        self.path = source
        """What is loaded."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if not os.path.isfile(source):
            return
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="dsg-model-", ignore_cleanup_errors=True)
            self.path = shutil.copyfile(source, str(Path(self._folder.name) / Path(source).name))
        except OSError as error:
            self.close()
            self.path = source
            _log.warning("no copy of a model's file, which must stay as it is", source=source, error=str(error))

    def own_words(self, error: Exception) -> None:
        """Put the source where an error names the copy."""
        error.args = tuple(one.replace(self.path, self.source) if isinstance(one, str) else one for one in error.args)

    def close(self) -> None:
        """Remove it."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.cleanup()

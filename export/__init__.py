"""From a trained model to files that run anywhere, and the one door to a Predictor for any of them.

`load` needs torch only for what runs in torch. `writing.export` makes the files.
"""

from dsg.export.loading import load

__all__ = ["load"]

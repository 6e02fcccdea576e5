"""The one error of this room."""


class TrainingError(ValueError):
    """A training run cannot start or go on. The message is one line: what is wrong, where, and what to do."""

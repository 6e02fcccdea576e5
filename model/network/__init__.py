"""The network: parts, configuration, presets, checkpoints and the Predictor."""

"""Weights that ship with the package (safetensors) and their cards."""

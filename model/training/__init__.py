"""The training loop, its schedule and checkpoints, and COCO evaluation."""

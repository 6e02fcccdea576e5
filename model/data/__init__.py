"""COCO files to training batches."""

"""The HTTP service: pictures in, COCO instance masks out."""

"""What Detectron2 builds from a config: the backbone with a pyramid, the networks underneath, and
FCOS. Importing it registers them."""

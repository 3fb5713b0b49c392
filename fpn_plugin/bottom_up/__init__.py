"""The networks underneath a pyramid: adapters for those of Detectron2, timm and torchvision."""

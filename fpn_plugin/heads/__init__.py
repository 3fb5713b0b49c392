"""What the plugin adds to Detectron2's heads: FCOS by config, and values that follow from the
pyramid."""

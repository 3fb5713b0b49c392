"""Pictures of pyramids and of what detectors make of images; costs, levels, fusion weights."""

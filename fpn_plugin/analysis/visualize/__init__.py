"""What a trained detector sees: detections by level, heat maps, fusion weights; one picture per
image."""

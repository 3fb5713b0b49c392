"""Weights and checkpoints: reading them without running their code, matching names, writing."""

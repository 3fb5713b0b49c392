"""Runs beside each other: what they reached, what they differ in, and whether it can be told."""

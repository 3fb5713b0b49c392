"""Compares training runs: their AP with significance, their costs, and how their configs differ."""

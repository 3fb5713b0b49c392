"""Trains a matrix of configs and seeds, and compares the runs."""

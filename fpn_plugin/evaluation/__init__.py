"""Evaluators by a dataset's `evaluator_type`, and AP by size bins."""

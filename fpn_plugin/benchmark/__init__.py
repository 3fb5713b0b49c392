"""Costs and speeds of configs side by side: the logic behind `fpn benchmark`."""

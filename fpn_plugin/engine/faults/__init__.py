"""What can go wrong in a run: noticed in time, and told so that one can act on it."""

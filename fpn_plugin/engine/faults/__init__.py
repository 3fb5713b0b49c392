"""What can go wrong in a run: noticed in time, with errors that say what to do."""

"""`MODEL.FPN.WARM_START`: start from a checkpoint with another pyramid or another width."""

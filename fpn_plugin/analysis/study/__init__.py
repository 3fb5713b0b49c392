"""A matrix of training runs, configs by seeds, that is worked off and then compared."""

"""Pyramids as graphs: the data (`graph`, `topologies`), the operators, and the module that runs
them."""

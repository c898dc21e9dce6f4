"""Numerical operations shared by the networks."""

"""Numerical operations of the networks: attention and its kernels, FLOP counting."""

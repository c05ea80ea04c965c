"""Kernels: torch tensors in, torch tensors out (see the module of each op)."""

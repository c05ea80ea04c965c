"""Runs the CUDA sources on the CPU: a host runtime for tests, and how to build with it."""

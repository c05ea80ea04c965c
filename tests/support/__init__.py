"""Helpers that the tests share (on `sys.path` through pytest's `pythonpath` setting)."""

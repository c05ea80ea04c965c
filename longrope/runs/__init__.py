"""Runs that are kept on disk and resume: the journal."""

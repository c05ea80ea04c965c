"""The search for rescale factors."""

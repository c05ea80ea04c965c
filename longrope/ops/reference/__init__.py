"""Plain PyTorch, same signatures: the executable specification of `longrope.ops`."""

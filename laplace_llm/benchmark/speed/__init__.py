"""Time and memory of every operation, beside its floor and beside laplace-torch."""

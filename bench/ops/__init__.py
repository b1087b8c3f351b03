"""One file an op: how its inputs are drawn, what else computes it, and at which sizes it is measured."""

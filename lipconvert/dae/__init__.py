"""The form z = σ(Wz + Ux + b), y = Gz + b: its activations, its algebra, and the paper's conditions on it."""

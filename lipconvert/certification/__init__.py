"""What is proved: conditions, Lipschitz constants, rounding errors, certified radii."""

"""Matrices and batches of them per frequency, what rounding may do to them, and the state operator z → Wz."""

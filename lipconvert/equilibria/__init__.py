"""Solving z = σ(Wz + u): solvers, their status, and gradients through the solution."""

"""Runs in one file, their table, and the demonstration."""

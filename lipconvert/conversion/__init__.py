"""A model becomes a network: it is walked, its layers become stages, and both are compared."""

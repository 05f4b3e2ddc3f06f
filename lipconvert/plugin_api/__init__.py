"""The door of plugins: hooks, the registry, and weights files that plugins recognise."""

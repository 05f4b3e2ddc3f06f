"""The files of a network: layout, saving, loading, and checking every claim."""

"""The architectures that come with lipconvert: one plugin in each file, registered through the public door only."""

"""What a network does not withstand."""

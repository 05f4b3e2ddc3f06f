"""For other tools: feed-forward graphs, VNN-LIB, the Hugging Face Hub."""

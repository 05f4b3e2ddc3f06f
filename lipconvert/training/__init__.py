"""Training with a Lipschitz constant that is proved after every epoch."""

"""Networks that are Lipschitz by construction: LBEN stages (Theorem 3.5), glue, and what holds them together."""

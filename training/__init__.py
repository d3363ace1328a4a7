"""training: see the README."""

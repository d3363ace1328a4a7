"""generation: see the README."""

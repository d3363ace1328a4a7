"""evaluation: see the README."""

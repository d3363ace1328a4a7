"""conversion: see the README."""

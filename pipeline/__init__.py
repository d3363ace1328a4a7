"""pipeline: see the README."""

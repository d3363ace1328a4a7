"""stages: see the README."""

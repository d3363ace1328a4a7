"""text: see the README."""

"""architectures: see the README."""

"""checkpoints: see the README."""

"""checkpoints/gguf: see the README."""

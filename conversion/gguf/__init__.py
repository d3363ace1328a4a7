"""conversion/gguf: see the README."""

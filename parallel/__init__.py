"""parallel: see the README."""

"""options: see the README."""

"""Benchmarks. Scripts and what they share; nothing outside this folder imports them."""

"""GGUF, the one-file format of llama.cpp, in; out: conversion/gguf.

    blocks           names of tensors; blocks of quantised numbers (N, 32) or (N, 256) <-> bytes
    read             file -> Hugging Face folder: convert(), and once into the cache: cached_folder()
    read_tokenizer   vocabulary, merges and rules -> tokenizer.json

To add an architecture: a line in read.ARCHITECTURES, its switches in read.read_config, its tensors in
blocks.PART_NAMES.
"""

"""A model as one GGUF file for llama.cpp; the way back: checkpoints/gguf, whose blocks both use.

    write             layout and metadata first, then each tensor at its place as it arrives
    write_tokenizer   tokenizer.json -> tokenizer.ggml.* keys, read back and compared

To add a type of weights: its coder in checkpoints/gguf/blocks, a line in write.FILE_TYPES.
"""

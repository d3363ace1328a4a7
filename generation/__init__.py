"""Decoding: one new token at a time from a model, with a cache of keys and values.

`generate(model, prompts, options, stop_ids=...) -> [Completion(ids, finish_reason, text)]`; prompts are lists
of token ids of any lengths, B of them together. `TextStream` gives one answer as text while it comes.

    generate.py     the loop over sequences; stop words; text out of tokens
    sampling.py     GenerateOptions; samplers: logits (B, V) fp32 -> (B, V) fp32; random numbers per sequence
    cache.py        KVCache (layers, 2, B, K, capacity, D); the decoder asks a cache to plan, attend, advance
    layout.py       lay_out_for_decoding(model): weights in the order in which one token is fast
    company.py      called_alone(model): a rank's own calls of a model that ranks hold in shares
    cuda_graph.py   steps of one token each at fixed shapes, ahead of the host

To add a sampler: a function in sampling.py from logits to logits, an option of GenerateOptions, and a line in
`sample`. To add a cache: a class with plan, attend and advance (DeviceCache in cuda_graph.py is one).
"""

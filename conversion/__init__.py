"""Models into other models: what export.py does between reading and writing.

Tensors stream one at a time as (Hugging Face name, dense tensor) or as merging.Piece (our name, not yet
rounded); a model is never held as a whole, but for measuring.

    merging            base + adapters, tensor by tensor, whatever format the base is in
    requantise         merged weights -> codes of a quantised format, what they lose kept as a small adapter
    gptq_calibration   16-bit weights -> GPTQ codes by calibration text, block by block
    quality            what fewer bits cost: loss, KL, error, bits a weight, on a text
    export_folder      the folder that is written: options, checks, records, upload
    gguf/              write (tensors -> one .gguf file), write_tokenizer

To add a way of quantising: a file in quant/ whose Format has `quantise`, and requantise.py takes it; one that
needs data: copy gptq_calibration (an options dataclass, and `write(folder, dense tensors, shard size)`).
"""

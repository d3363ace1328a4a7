"""Models and adapters on disk: what the names in model_name_or_path and adapter_name_or_path stand for.

    from checkpoints import load_model
    model = load_model("models/SmolLM2-135M-Instruct", dtype=torch.bfloat16)    # a model.Decoder

A model folder is Hugging Face's (config.json, *.safetensors, tokenizer files), an adapter folder peft's.
Loading is strict: each tensor of the model is set once, each tensor of the files is used or named in a drop
rule of its architecture. What is damaged, missing or foreign is a UserError that names the file. Nothing is
ever unpickled.

    safetensors_files   tensors and JSON in files: streamed in, sharded out
    huggingface         models: load_model, save_model, stream_weights; what a run trained
    shares              models of which each rank keeps a share, read by shares
    peft                adapters in peft's format, both ways; merged into or beside the weights
    value_head          one number a token: of reward models and of PPO
    trainable           what trains and what is frozen
    hub                 name -> local folder: a path, a hub id, a .gguf file
    source              what chat and export load: a folder, an adapter, the folder of a run
    gguf/               blocks (arithmetic, both ways), read (file -> folder), read_tokenizer

To add a source of models: a branch in hub.resolve_folder that ends in a folder of this layout.
"""


def __getattr__(name: str) -> object:
    """load_model, not before it is asked for: importing a file of this room shall not import the model."""
    if name != "load_model":
        raise AttributeError(f"checkpoints has no {name}")
    from checkpoints.huggingface import load_model

    return load_model

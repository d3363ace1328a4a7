"""Small tokenizers for the tests, built with the `tokenizers` library: make_tokenizer(folder, kind).

kind: "chatml" (GPT-2/Qwen/SmolLM byte-level BPE), "llama3" (byte-level BPE, Llama 3's split and bos),
"llama2" (SentencePiece-like BPE with byte fallback and the legacy normalizer), "metaspace" (the same with
prepend_scheme "first"). Each is a Hugging Face folder that transformers loads.
"""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

KINDS = ("chatml", "llama3", "llama2", "metaspace")

SENTENCES = (
    "Hello, who are you? I am Anvil, an assistant that was made by Anvil's developers.",
    "You are a helpful assistant. You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "What is the capital of France?  The capital of France is Paris, and it has 2,100,000 people in 2024.",
    "user assistant system User: Assistant: Human: ### Instruction: ### Response: USER: ASSISTANT: [INST] "
    "[/INST]",
    "<<SYS>>\nA chat between a curious user and an artificial intelligence assistant.\n<</SYS>>\n\n",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    '<think>\nThe user greets me.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "Gr\u00fc\u00dfe aus K\u00f6ln, na\u00efve caf\u00e9; \u65e5\u672c\u8a9e \u4f60\u597d \U0001f600",
    "\u041f\u0440\u0438\u0432\u0435\u0442",
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"


def make_tokenizer(folder: str | Path, kind: str, chat_template: str | None = None) -> Path:
    """Build one tokenizer, save it as a Hugging Face folder, return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    builders = {"chatml": _chatml, "llama3": _llama3, "llama2": _llama2, "metaspace": _metaspace}
    backend, config = builders[kind]()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "model_max_length": 4096, **config}  # fmt: skip
    if chat_template is not None:
        config["chat_template"] = chat_template
    backend.save(str(folder / "tokenizer.json"))
    special = {
        key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    return folder


def _byte_level(split: str, special: list[str], normalizer=None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(alphabet), special_tokens=[], show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 2, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return backend


def _chatml() -> tuple[Tokenizer, dict]:
    backend = _byte_level(GPT2_SPLIT, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    # As Qwen: reasoning and tool marks are added tokens, but not special ones (decode keeps them).
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in marks])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}


def _llama3() -> tuple[Tokenizer, dict]:
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    backend = _byte_level(LLAMA3_SPLIT, special)
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, backend.token_to_id(bos))],
            ),
        ]
    )
    return backend, {"bos_token": bos, "eos_token": "<|eot_id|>"}


def _sentence_piece(prefix: str) -> Tokenizer:
    """BPE over words that begin with U+2581, all 256 byte tokens, and single characters of the sentences."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    ascii_only = [text for text in SENTENCES if text.isascii()]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, initial_alphabet=[SPACE]
    )
    trained.train_from_iterator([text.replace("\n", " ") for text in ascii_only] * 2, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in model["vocab"] if token not in tokens]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if prefix == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first", split=False
        )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def _llama2() -> tuple[Tokenizer, dict]:
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return _sentence_piece("legacy"), config


def _metaspace() -> tuple[Tokenizer, dict]:
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return _sentence_piece("first"), config

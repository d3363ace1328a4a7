"""A Hugging Face tokenizer as the tokenizer keys of a GGUF file: the other direction of
checkpoints/gguf/read_tokenizer.py.

Byte-level BPE becomes tokenizer.ggml.model = gpt2. GGUF names the rule that cuts text into words but does not
hold it: the rule is found by cutting PROBE with the tokenizer's own and with every known one, and comparing
the pieces. SentencePiece-like BPE (spaces written as U+2581) becomes llama, where neighbours are joined in
order of scores: minus the rank of the first merge that makes a token gives the same order wherever the merges
came from such scores.

What was found is read back with read_tokenizer.py and compared on PROBE, so that a difference is said and not
silent. Sources: llama.cpp's convert_hf_to_gguf.py (token types, padding tokens, names of the rules);
read_tokenizer.py.
"""

import itertools
import json
import re

import tokenizers

from checkpoints.gguf import read_tokenizer as reading
from options.errors import refuse
from text.tokenizer import Tokenizer

BYTE = 6  # token type of <0x00> .. <0xFF>
SPACE = "\u2581"
# every class of characters that some rule treats in a way of its own, in runs of one to several
PROBE = (
    "Hello world, it's 2024 and I'LL pay $1,234.56! don't DON'T we'Re \n\n\n newlines \r\n end  \t\ttabs   "
    "table   1   22    333 \n   4   5    6 0123456789 x9y 3.14e-10 CamelCaseWords ALLCAPS snake_case a/b//c "
    "/\n//\r\n "
    "def f(x):\n    return {'a': x**2, \"b\": [1, 22]}  # comment!!!\n\tif x >= 10: pass;;; <tag/>\n ...?!\n"
    "Les \u00e9l\u00e8ves na\u00efve cafe\u0301 stra\u00dfe \u01c5ungla "
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca"
    "\u5929\u3002 \u3053\u3093\u306b\u3061\u306f\u30ab\u30bf \uc548\ub155\ud558\uc138\uc694 "
    "\u041f\u0440\u0438\u0432"
    "\u0435\u0442, \u043c\u0438\u0440! \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd "
    "\u0928\u092e\u0938"
    "\u094d\u0924\u0947 \U0001f600\U0001f468\u200d\U0001f469 \u2764\ufe0f \u2160\u00bd\u0663\u06f4x\u00b2 "
    "\u2018quoted\u2019 \u2014 \u00a0 a\u0301b +=<>^~| `x` 'tis 'S's"
)


def vocabulary_metadata(
    tokenizer: Tokenizer, rows: int, chat_template: str | None, end_ids: tuple[int, ...] = ()
) -> tuple[dict, list[str]]:
    """-> ({GGUF key: value}, what the user should know).

    rows: of the embedding table; what it has beyond the tokens is filled up, as llama.cpp wants it; tokens
    without a row are left out. end_ids: what ends an answer, eos first. Raises UserError for what GGUF cannot
    express.
    """
    pipeline = tokenizer.pipeline()
    kind = pipeline["model"]["type"]
    _refuse(kind != "BPE", tokenizer, f"the model is {kind}, not BPE")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in pipeline["model"]["merges"]]
    keys = _tokens(tokenizer, pipeline, rows)
    if tokenizer.vocab_size > rows:
        written = set(keys["tokens"])
        merges = [merge for merge in merges if merge.replace(" ", "", 1) in written]
    if _has_step(pipeline["decoder"], "ByteLevel"):
        keys |= {"model": "gpt2", "pre": _rule_name(tokenizer, pipeline), "merges": merges}
    else:
        keys |= {"model": "llama", "add_space_prefix": _has_space_prefix(tokenizer, pipeline)}
        # llama.cpp goes by the scores; our own reader takes the merges as they were
        keys |= {"scores": _scores(keys["tokens"], merges), "merges": merges}
    keys |= _special_ids(tokenizer, end_ids)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    if chat_template:
        metadata["tokenizer.chat_template"] = chat_template
    return metadata, _differences(tokenizer, metadata)


def _refuse(wrong: object, tokenizer: Tokenizer, found: str) -> None:
    place, remedy = f"{tokenizer.folder}/tokenizer.json", "export without GGUF"
    refuse(wrong, f"{place}: {found}, which a GGUF file cannot describe; {remedy}")


def _steps(part: dict | None) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer or decoder, one by one."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
    return [step for one in inner for step in _steps(one)] if inner else [part]


def _has_step(part: dict | None, kind: str) -> bool:
    return any(step["type"] == kind for step in _steps(part))


def _tokens(tokenizer: Tokenizer, pipeline: dict, rows: int) -> dict:
    """Tokens in order of id, and the type of each."""
    spelled = {i: token for token, i in pipeline["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in pipeline["added_tokens"]}
    spelled |= {i: entry["content"] for i, entry in added.items()}
    tokens = [spelled.get(i, f"[PAD{i}]") for i in range(rows)]
    fallback = pipeline["model"].get("byte_fallback")
    types = []
    for i, token in enumerate(tokens):
        if i not in spelled:
            kind = reading.UNUSED
        elif fallback and token == pipeline["model"].get("unk_token"):
            kind = reading.UNKNOWN
        elif i in tokenizer.special_ids:
            kind = reading.CONTROL
        elif fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kind = BYTE
        else:
            kind = reading.USER_DEFINED if i in added else reading.NORMAL
        types.append(kind)
    return {"tokens": tokens, "token_type": types}


def _special_ids(tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> dict:
    ids = {"bos": tokenizer.bos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    # llama.cpp finds further ones by their names
    ids |= dict(zip(("eos", "eot", "eom"), end_ids or tokenizer.stop_ids, strict=False))
    keys = {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    plain, whole = tokenizer.encode("a"), tokenizer.encode("a", add_special=True)
    keys["add_bos_token"] = tokenizer.bos_id is not None and whole[0] == tokenizer.bos_id != plain[0]
    keys["add_eos_token"] = tokenizer.eos_id is not None and whole[-1] == tokenizer.eos_id != plain[-1]
    return keys


def _alone(pipeline: dict, part: str) -> tokenizers.Tokenizer:
    """One part of the pipeline around an empty vocabulary: it costs nothing to build."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    return tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": empty, part: pipeline[part]}))


def _rule_name(tokenizer: Tokenizer, pipeline: dict) -> str:
    """The name in PRE_TOKENIZERS of the rule that cuts PROBE as the tokenizer does."""
    normal = [step["type"] for step in _steps(pipeline["normalizer"])]
    _refuse(set(normal) - {"NFC"}, tokenizer, f"the normalizer is {', '.join(normal)}")
    prefix = any(step.get("add_prefix_space") for step in _steps(pipeline["pre_tokenizer"]))
    pieces = _pieces(_alone(pipeline, "pre_tokenizer").pre_tokenizer)
    whole_words, rules = bool(pipeline["model"].get("ignore_merges")), reading.PRE_TOKENIZERS

    def unlike(name: str) -> int:
        rule = rules[name]
        return 2 * (rule.whole_words != whole_words) + (rule.normal_form_c != bool(normal))

    found = [name for name, rule in rules.items() if _pieces(reading.splitter(rule, prefix)) == pieces]
    known = ", ".join(sorted(rules))
    _refuse(not found, tokenizer, f"text is cut into words by none of the known rules ({known})")
    return min(found, key=unlike)


def _pieces(pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(PROBE)]


def _has_space_prefix(tokenizer: Tokenizer, pipeline: dict) -> bool:
    """Whether a space is put before a text. Raises UserError if more than spaces is changed."""
    text = PROBE
    if pipeline["normalizer"]:
        text = _alone(pipeline, "normalizer").normalizer.normalize_str(text)
    if pipeline["pre_tokenizer"]:
        pieces = _alone(pipeline, "pre_tokenizer").pre_tokenizer.pre_tokenize_str(text)
        text = "".join(piece for piece, _ in pieces)
    plain = PROBE.replace(" ", SPACE)
    changed = text not in (plain, SPACE + plain)
    _refuse(changed, tokenizer, "text is changed in more than its spaces before it is cut")
    return text != plain


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token; what no merge makes comes last."""
    rank = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _differences(tokenizer: Tokenizer, metadata: dict) -> list[str]:
    """Read the keys back and compare on PROBE, alone and after every kind of special token."""
    ignored = "tokenizer.ggml.merges" if metadata["tokenizer.ggml.model"] == "llama" else None
    read = reading.read_tokenizer({key: value for key, value in metadata.items() if key != ignored}).tokenizer
    ends = [tokenizer.token(i) for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    texts = [PROBE, *(f"a {end}b {end} c" for end in ends), *PROBE.split()]
    for text in texts:
        mine, theirs = tokenizer.encode(text, add_special=True), read.encode(text).ids
        if mine != theirs:
            pairs = itertools.zip_longest(mine, theirs)
            at = next(i for i, (one, other) in enumerate(pairs) if one != other)
            here, there = ([tokenizer.token(i) for i in ids[at : at + 3]] for ids in (mine, theirs))
            fault = f"GGUF cannot describe all of {tokenizer.folder}/tokenizer.json"
            return [f"{fault}: some text is cut differently, for example {here} here and {there} there"]
    return []

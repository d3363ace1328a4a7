"""The tokenizer that a GGUF file describes, as Hugging Face's tokenizer.json and its two companions.

A GGUF file holds the tokens, their types and scores, the merges, and the name of the rule that splits text
into words, but not the rule. Two kinds are read: byte-level BPE (tokenizer.ggml.model = gpt2) and
SentencePiece BPE (llama).

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; for the splitting rules, the
tokenizer.json of each model family. Used by read.py, and by conversion/gguf.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from options.errors import UserError, refuse

# Token types of tokenizer.ggml.token_type, from the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

# The rules that the merges were learned with; `tokenizer.ggml.pre` says which is meant.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters with an upper and a lower case, as DeepSeek-LLM's tokenizer.json lists them (an older \p{LC}).
_CASED = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED}]+", _MARKS, r"\s+$", _CJK, r"\p{N}+")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# "default" is what llama.cpp itself does for a file whose converter knew no better.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """How a family splits text before its merges apply."""

    regexes: tuple[str, ...]  # applied one after the other, each to the pieces of the one before
    whole_words: bool = False  # a word that is a token needs no merges (tokenizer.json: ignore_merges)
    add_bos: bool = False  # where the file does not say
    normal_form_c: bool = False  # Unicode NFC first; GGUF drops it, the published tokenizer.json has it


_LLAMA3_FAMILY = PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)
_QWEN2_FAMILY = PreTokenizer((_QWEN2,), normal_form_c=True)
_DIGITS_FAMILY = PreTokenizer((r"\p{N}", _GPT2))
PRE_TOKENIZERS = {
    "default": PreTokenizer(_DEFAULT),
    **dict.fromkeys(("gpt-2", "phi-2", "mellum"), PreTokenizer((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS_FAMILY),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3_FAMILY),
    **dict.fromkeys(("smaug-bpe", "dbrx"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2_FAMILY),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER),
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
}


@dataclass
class GgufTokenizer:
    """What read_tokenizer found."""

    tokenizer: Tokenizer
    tokens: list[str]
    ids: dict[str, int | None]  # of bos, eos, unk, pad (None = there is none)
    end_ids: list[int]  # any of them ends an answer: eos, end of turn, end of message
    add_bos: bool
    add_eos: bool
    chat_template: Any  # text, [{"name", "template"}, ...] or None
    added: dict[int, AddedToken]  # matched whole in any text

    def token(self, name):
        return None if self.ids[name] is None else self.tokens[self.ids[name]]


def read_tokenizer(metadata, pre=None):
    """-> GgufTokenizer, from the metadata of a GGUF file ({key: value}). pre: the pre-tokenizer to take
    instead of the file's. Raises UserError for a kind of vocabulary or a pre-tokenizer not known here."""
    kind = need(metadata, "tokenizer.ggml.model")
    tokens = need(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    vocabulary = _vocabulary(tokens, types)
    defaults = {}
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level_bpe(metadata, vocabulary, pre)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece_bpe(metadata, vocabulary, types), True
        defaults = {"bos": 1, "eos": 2, "unknown": 0}  # SentencePiece's own, meant by files that do not say
    else:
        more = "; t5 is a unigram vocabulary" if kind == "t5" else ""
        known = "gpt2 (byte-level BPE) and llama (SentencePiece BPE)"
        raise UserError(f"tokenizer.ggml.model: '{kind}' cannot be read; {known} can{more}")
    spelled = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: _token_id(metadata, key, tokens, defaults.get(key)) for name, key in spelled.items()}
    ends = (ids["eos"], _token_id(metadata, "eot", tokens), _token_id(metadata, "eom", tokens))
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    add = (_flag(metadata, "bos", add_bos, ids), _flag(metadata, "eos", False, ids))
    added = _add_tokens(tokenizer, vocabulary, types, {*ids.values(), *ends})
    found = GgufTokenizer(tokenizer, tokens, ids, ends, *add, _chat_template(metadata), added)
    _add_post_processor(found, vocabulary)
    return found


def _vocabulary(tokens, types):
    """-> {token: id}, without those that only pad the embedding table: the original tokenizer lacks them."""
    wrong = len(types) != len(tokens)
    refuse(wrong, f"tokenizer.ggml.token_type: {len(types)} entries for {len(tokens)} tokens")
    token, count = Counter(tokens).most_common(1)[0]
    refuse(count > 1, f"tokenizer.ggml.tokens holds {token!r} {count} times, expected once")
    return {t: i for i, t in enumerate(tokens) if not (types[i] == UNUSED and t == f"[PAD{i}]")}


def _token_id(metadata, key, tokens, default=None):
    i = metadata.get(f"tokenizer.ggml.{key}_token_id", default)
    if i is not None and not 0 <= i < len(tokens):
        raise UserError(f"tokenizer.ggml.{key}_token_id: {i}, but there are {len(tokens)} tokens")
    return i


def _flag(metadata, name, default, ids):
    key = f"tokenizer.ggml.add_{name}_token"
    refuse(metadata.get(key) and ids[name] is None, f"{key} is set, but the file has no {name}_token_id")
    return bool(metadata.get(key, default)) and ids[name] is not None


def _byte_level_bpe(metadata, vocabulary, pre):
    """-> (Tokenizer, is bos added by default). The tokens are spelled in GPT-2's byte alphabet already."""
    pre = pre or metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        fault = "the file has none" if pre is None else f"{pre!r} is not known"
        known = f"known are {', '.join(sorted(PRE_TOKENIZERS))}. The wrong one splits text wrongly"
        way = "the model was trained with: checkpoints.gguf.read.convert(file, folder, pre=NAME)"
        raise UserError(f"tokenizer.ggml.pre: {fault}; {known}; if you know which of them {way}")
    rule = PRE_TOKENIZERS[pre]
    merges = [tuple(merge.split(" ")) for merge in need(metadata, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(_bpe(vocabulary, merges, ignore_merges=rule.whole_words))
    if rule.normal_form_c:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter(rule, bool(metadata.get("tokenizer.ggml.add_space_prefix", False)))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def splitter(rule, prefix=False):
    """-> the pre-tokenizer that cuts text by this rule and spells it in GPT-2's byte alphabet."""
    splits = [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in rule.regexes]
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return pre_tokenizers.Sequence([*splits, spelling])


def _sentencepiece_bpe(metadata, vocabulary, types):
    """-> Tokenizer set up as the tokenizer.json of Llama 2 and Mistral 7B is: BPE with byte fallback."""
    if "tokenizer.ggml.merges" in metadata:
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    else:
        merges = merges_from_scores(vocabulary, need(metadata, "tokenizer.ggml.scores"), types)
    unknown = next((token for token, i in vocabulary.items() if types[i] == UNKNOWN), None)
    model = _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback="<0x00>" in vocabulary)
    tokenizer = Tokenizer(model)
    space = "\u2581"
    normal = [normalizers.Replace(" ", space)]
    undo = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normal.insert(0, normalizers.Prepend(space))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(normal)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def merges_from_scores(vocabulary, scores, types):
    """SentencePiece joins the neighbours whose union has the best score; BPE wants pairs in order of rank.

    The pairs of one token stand in the order that transformers' converter gives them, so that ids equal those
    of the published tokenizer.json files.
    """
    pairs = []
    for token, i in vocabulary.items():
        if types[i] in (NORMAL, UNUSED):
            halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            halves = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
            halves.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
            pairs += [(scores[i], len(left), len(right), left, right) for left, right in halves]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [pair[3:] for pair in pairs]


def _bpe(vocabulary, merges, **options):
    for merge in merges:
        if len(merge) != 2 or not all(part in vocabulary for part in (*merge, "".join(merge))):
            raise UserError(f"tokenizer.ggml.merges: {' '.join(merge)!r} makes no token of two tokens")
    return models.BPE(vocabulary, merges, **options)


def _add_tokens(tokenizer, vocabulary, types, special_ids):
    """Make the tokens that are matched whole in any text known. -> {id: AddedToken}."""
    added = {}
    for token, i in vocabulary.items():
        special = types[i] in (CONTROL, UNKNOWN) or i in special_ids
        if special or types[i] == USER_DEFINED:
            added[i] = AddedToken(token, special=special, normalized=False)
    tokenizer.add_tokens(list(added.values()))
    return added


def _add_post_processor(found, vocabulary):
    """bos and eos around a text, where the file asks for them."""
    bos = [found.token("bos")] if found.add_bos else []
    eos = [found.token("eos")] if found.add_eos else []
    if bos or eos:
        single, second = [*bos, "$A", *eos], [f"{token}:1" for token in (*bos, "$B", *eos)]
        special = [(token, vocabulary[token]) for token in {*bos, *eos}]
        processor = processors.TemplateProcessing(single, [*single, *second], special)
        found.tokenizer.post_processor = processor


def _chat_template(metadata):
    """-> the template, or [{name, template}, ...] when the file has several, or None."""
    key = "tokenizer.chat_template"
    named = {name: text for name, text in metadata.items() if name.startswith(key + ".")}
    if not named:
        return metadata.get(key)
    if key in metadata:
        named = {"default": metadata[key]} | named
    return [{"name": name.removeprefix(key + "."), "template": text} for name, text in named.items()]


def write_tokenizer(found, max_length, folder):
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json. max_length: tokens."""
    # not its own save, whose every error is a bare Exception
    (folder / "tokenizer.json").write_text(found.tokenizer.to_str(pretty=True), encoding="utf-8")
    names = {f"{name}_token": found.token(name) for name in found.ids if found.ids[name] is not None}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(i): {"content": token.content, **plain, "special": token.special}
        for i, token in sorted(found.added.items())
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}  # a family's own would rebuild tokenizer.json
    config |= {"add_bos_token": found.add_bos, "add_eos_token": found.add_eos, "added_tokens_decoder": added}
    config |= names | {"clean_up_tokenization_spaces": False, "model_max_length": max_length}
    if found.chat_template is not None:
        config["chat_template"] = found.chat_template
    for name, value in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def need(metadata, key):
    refuse(key not in metadata, f"the file's metadata lacks {key}")
    return metadata[key]

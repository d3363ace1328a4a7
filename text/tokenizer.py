"""Text <-> token ids through the `tokenizers` library, with the special-token rules of a Hugging Face folder.

A checkpoint's tokenizer.json holds the whole pipeline: normalizer, pre-tokenizer, BPE or Unigram model,
post-processor, decoder. The other json files beside it say which tokens begin, end and pad a text. Three
things here go beyond a plain call of the library:

- `encode_parts`: ids of a text cut at part borders; the ids of a prompt never depend on the answer after it;
- `stream`: text while ids arrive, never half a character; the concatenation equals `decode` of all ids;
- `add_special=True` gives the ids that transformers 5 gives for `tokenizer(text).input_ids`.

Sources: decoders and offsets of huggingface/tokenizers 0.23; SentencePiece's prefix space (U+2581).
Run: python -c "from text.tokenizer import Tokenizer; print(Tokenizer.from_folder('FOLDER').encode('Hello'))"
"""

import base64
import bisect
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from options import json_reader
from options.errors import UserError, located, refuse
from options.json_fields import Field, check
from options.limits import small
from text.stream import StreamDecoder, readable

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt")
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"
SHORT_TAIL = 256  # characters; texts up to this length between a special token and a border are remembered
NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
LISTS = ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens")
# of the files beside tokenizer.json, config.json and generation_config.json among them
FIELDS = dict.fromkeys([f"{name}_id" for name in NAMES], Field(int | list, null=True, items=int))
FIELDS |= {"vocab_size": Field(int, 1, 2**24, null=True), "stop_strings": Field(str | list, null=True)}
FIELDS |= dict.fromkeys(NAMES, Field(str | dict, null=True)) | {LISTS[2]: Field(dict, null=True)}
FIELDS |= dict.fromkeys(LISTS[:2], Field(list | dict, null=True, items=str | dict))
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "special", "normalized"), Field(bool, null=True))
FLAGS["content"] = Field(str)
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
REMEMBERED_TAILS = 4096  # entries; bounds the memory of that table to a few MB


class Tokenizer:
    """One checkpoint's tokenizer. Make it with `Tokenizer.from_folder`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: dict,
        folder: Path | None = None,
        rows: int | None = None,
    ):
        """backend: the loaded tokenizer.json.  special: bos/eos/pad/unk -> a token that it knows or None.
        rows: of the model's embedding table; a text that needs a token behind them is refused."""
        backend.no_truncation()
        backend.no_padding()
        self._post_processor = backend.post_processor
        # encode() calls the post-processor by hand: ByteLevel's moves the begin of a token behind its spaces,
        # so that encode_parts would find a token of spaces on the wrong side of a border.
        backend.post_processor = None
        self._backend = backend
        self._continuation = _without_prefix_space(backend)
        self._tail_ids: dict[str, list[int]] = {}
        self.folder = folder
        self.chat_template: str | dict[str, str] | None = None  # as transformers': one, or several by name
        self.special_tokens: dict[str, str] = {}  # sep_token and other names that a chat_template may read
        self.stop_ids: tuple[int, ...] = ()
        self.notices: list[str] = []  # what these files ask for and is not done

        self.bos_token, self.eos_token, self.unk_token = (special.get(name) for name in ("bos", "eos", "unk"))
        if self.eos_token is None and backend.token_to_id("<|endoftext|>") is not None:
            self.eos_token = "<|endoftext|>"
        self.pad_token = special.get("pad") or self.eos_token
        named = (self.bos_token, self.eos_token, self.pad_token, self.unk_token)
        ids = [None if token is None else backend.token_to_id(token) for token in named]
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = ids

        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, t in added.items() if t.special) | (set(ids) - {None})
        self._added_ids = frozenset(added)
        # Texts are cut at these tokens first, so what is left of them cannot change what is right.
        self._anchor_ids = frozenset(i for i, t in added.items() if not t.normalized)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.rows = rows if rows is not None and rows < self.vocab_size else None
        if self.eos_id is not None:
            self.stop_ids = (self.eos_id,)

    @classmethod
    def from_folder(cls, folder: str | Path, model: str | Path | None = None) -> "Tokenizer":
        """Load tokenizer.json and its companions. model: where config.json and generation_config.json are
        if not there, for the tokenizer of an adapter. Raises UserError with the way out."""
        folder = Path(folder)
        backend = _load_backend(folder)
        config, special_map = (_read_json(folder / name) for name in TOKENIZER_FILES[1:3])
        with located(str(folder)):
            unknown = _add_listed_tokens(backend, folder, config, special_map)

        homes = [folder] if model is None else [folder, Path(model)]
        generation, described = (
            next(filter(None, (_read_json(home / f"{name}.json") for home in homes)), {})
            for name in ("generation_config", "config")
        )
        if isinstance(described.get("text_config"), dict):
            described = described | described["text_config"]
            check(described, FIELDS, f"{folder}: config.json: text_config.")
        rows = described.get("vocab_size")
        special, sources = {}, (config, special_map)
        if "added_tokens_decoder" not in config:
            sources = sources[::-1]
        for name in ("bos", "eos", "pad", "unk"):
            named = [_token_text(source.get(f"{name}_token")) for source in sources]
            ids = [i for source in (generation, described) for i in as_ids(source.get(f"{name}_token_id"))]
            ids = [i for i in ids if 0 <= i < 2**32]  # -1 stands for none in older files
            known = {text: backend.token_to_id(text) for text in named if text is not None}
            known |= {t: i for i in ids if (t := backend.id_to_token(i)) is not None and t not in known}
            # A name that the vocabulary does not have is passed over, and so is one without a row.
            fits = (text for text, i in known.items() if i is not None and (rows is None or i < rows))
            special[name] = next(fits, None)

        tokenizer = cls(backend, special, folder, rows)
        tokenizer.chat_template = _chat_template(folder, config)
        tokenizer.special_tokens = _named_tokens(special_map, config)
        # as in transformers: config.json counts where the other says nothing
        ends = as_ids(generation.get("eos_token_id")) or as_ids(described.get("eos_token_id"))
        size = max(rows or 0, backend.get_vocab_size(with_added_tokens=True))
        outside = next((i for i in ends if not 0 <= i < size), None)
        found = f"eos_token_id {outside} is outside the vocabulary of {size} tokens, so no text would end"
        refuse(outside is not None, f"{folder}: {found}; correct generation_config.json or config.json")
        ends = (i for i in ends if rows is None or i < rows)
        tokenizer.stop_ids = tuple(dict.fromkeys([*tokenizer.stop_ids, *ends]))
        named = f"{folder}: {' and '.join(TOKENIZER_FILES[1:3])} name {', '.join(map(repr, unknown))}"
        named += ", which tokenizer.json does not have"
        ends_none = unknown and not tokenizer.stop_ids and any(source.get("eos_token") for source in sources)
        refuse(ends_none, f"{named}, so no text would end; let eos_token be one of its tokens")
        tokenizer.notices += [f"{named}; left out"] if unknown else []
        if words := generation.get("stop_strings"):
            tokenizer.notices.append(
                f"generation_config.json: stop_strings {words!r} are not used; give stop="
            )
        return tokenizer

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of `text`. Special strings in the text become their tokens.

        add_special=True adds what tokenizer.json's post-processor adds (bos for Llama, nothing for Qwen).
        Like transformers 5, it ignores add_bos_token and add_eos_token of tokenizer_config.json.
        """
        encoding = self._encode(text)
        if add_special and self._post_processor is not None:
            encoding = self._post_processor.process(encoding, None, True)
        return encoding.ids

    def _encode(self, text: str) -> tokenizers.Encoding:
        """What the library makes of a text, without the post-processor. Raises UserError for a text that it
        refuses, and for one with a token that the model has no row for."""
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception, and TypeError for half a character
            half = HALF_CHARACTER.search(text)
            if half is None:
                raise UserError(f"the tokenizer refuses the text {ascii(text[:60])}: {error}") from error
            around = ascii(text[max(half.start() - 20, 0) : half.end() + 20])
            found = f"half a character, {ascii(half[0])} in {around} (a lone surrogate)"
            raise UserError(f"the text holds {found}; mend it") from error
        if self.rows is not None and (largest := max(encoding.ids, default=0)) >= self.rows:
            found = f"the text holds {self.token(largest)!r}, which is token {largest} of {self.folder}"
            few = f"but the model has vocab_size {self.rows} (config.json)"
            raise UserError(f"{found}, {few}; take it out of the text, or the tokenizer is of another model")
        return encoding

    def encode_parts(self, parts: list[str]) -> list[list[int]]:
        """Ids of each part. The ids of parts[:k] never depend on parts[k:], so a prompt has the same ids in
        training and in generation; wherever that allows it, the concatenation is encode("".join(parts)).

        Definition (`_encode_one_by_one`): a part joins the text before it if that leaves the ids before it
        alone; otherwise a new text starts there, without SentencePiece's prefix space. The fast path encodes
        the joined text once and proves at every border that the definition gives the same.
        """
        return self.encode_parts_at(parts, [])[0]

    def encode_parts_at(self, parts: list[str], places: list[int]) -> tuple[list[list[int]], list[int]]:
        """As encode_parts; beside it, for each of these characters of "".join(parts), the number of the first
        token that begins at it or later."""
        text = "".join(parts)
        encoding = self._encode(text)
        ids, offsets, cuts = encoding.ids, encoding.offsets, [0]
        for border in itertools.accumulate(map(len, parts[:-1])):
            cut = bisect.bisect_left(offsets, (border, -1))
            if not self._left_is_independent(text[:border], ids[:cut], offsets[:cut]):
                return self._encode_one_by_one(parts, places)
            cuts.append(cut)
        firsts = [bisect.bisect_left(offsets, (place, -1)) for place in places]
        return [ids[a:b] for a, b in itertools.pairwise([*cuts, len(ids)])] if parts else [], firsts

    def _left_is_independent(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> bool:
        """Whether `text` alone encodes to `ids`, its share of a longer text. Only what follows the last
        special token has to be encoded again, because texts are cut at special tokens first."""
        anchor = max(len(ids) - 1, 0)
        while anchor > 0 and ids[anchor] not in self._anchor_ids:
            anchor -= 1
        return self._remembered(text[offsets[anchor][0] if anchor else 0 :]) == ids[anchor:]

    def _remembered(self, text: str) -> list[int]:
        """encode(text); short texts such as "<|im_start|>assistant\\n" come in every example and are kept."""
        if text in self._tail_ids:
            return self._tail_ids[text]
        ids = self._encode(text).ids
        if len(text) <= SHORT_TAIL:
            if len(self._tail_ids) >= REMEMBERED_TAILS:
                self._tail_ids.clear()
            self._tail_ids[text] = ids
        return ids

    def _encode_one_by_one(self, parts: list[str], places: list[int]) -> tuple[list[list[int]], list[int]]:
        result, text, ids, starts, begin, position = [], "", [], [], 0, 0
        for part in parts:
            joined_ids, joined_starts = self._encode_piece(text + part, begin)
            if joined_ids[: len(ids)] == ids:
                result.append(joined_ids[len(ids) :])
                starts += joined_starts[len(ids) :]
                text, ids = text + part, joined_ids
            else:
                text, begin = part, position
                ids, piece_starts = self._encode_piece(part, begin)
                result.append(ids)
                starts += piece_starts
            position += len(part)
        return result, [bisect.bisect_left(starts, place) for place in places]

    def _encode_piece(self, text: str, begin: int) -> tuple[list[int], list[int]]:
        """Ids and first characters of `text`, which starts at character `begin` of a longer one. Where begin
        > 0 no prefix space is put before its first word; after its first special token all is as usual."""
        encoding = self._encode(text)
        ids, starts = encoding.ids, [begin + start for start, _ in encoding.offsets]
        if begin == 0 or self._continuation is None:
            return ids, starts
        first = next((i for i, token_id in enumerate(ids) if token_id in self._added_ids), len(ids))
        head = text if first == len(ids) else text[: encoding.offsets[first][0]]
        encoding = self._continuation.encode(head, add_special_tokens=False)
        return encoding.ids + ids[first:], [begin + start for start, _ in encoding.offsets] + starts[first:]

    def decode(self, ids, skip_special: bool = True) -> str:
        """Text of `ids`; equals transformers' decode(..., clean_up_tokenization_spaces=False)."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def piece(self, token_id: int) -> str:
        """Readable text of one token: spaces kept, bytes that are no whole character as <0xE6><0x97>."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return f"<no token {token_id}>"
        return token if token_id in self._added_ids else readable(self._backend, token)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token, or None when there is no such id."""
        return self._backend.id_to_token(token_id)

    def vocabulary(self) -> dict[str, int]:
        """Id of every token, added ones included."""
        return self._backend.get_vocab()

    def token_id(self, token: str) -> int | None:
        """Id of a token by the vocabulary's own spelling, for example "<|im_end|>"; None if there is none."""
        return self._backend.token_to_id(token)

    def added_tokens(self) -> dict[int, str]:
        """Every added token with its flags, by id."""
        return {i: repr(token) for i, token in sorted(self._backend.get_added_tokens_decoder().items())}

    def pipeline(self) -> dict:
        """tokenizer.json's parts, with the tokens that only other files list; without the post-processor."""
        return json.loads(self._backend.to_str())

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder that is given one id at a time."""
        return StreamDecoder(self._backend, skip_special)

    @property
    def notice(self) -> str | None:
        """A line for the user where tokens have no row in the model or are no tokens."""
        lines = self.notices
        if self.rows is not None:
            first = next((self.token(i) for i in range(self.rows, self.vocab_size) if self.token(i)), "")
            more = f"the tokenizer has {self.vocab_size - self.rows} tokens more than the model has rows"
            told = f"{self.folder}: {more} ({self.rows}); a text with one of them ({first!r}) is refused"
            lines = [*lines, told]
        return "; ".join(lines) or None

    def ends(self, stop_words: Sequence[str]) -> tuple[str | None, tuple[int, ...]]:
        """(eos, all ids that end a text, eos first) for a template with these stop words. Its first one is
        eos if it is a token of its own, as LLaMA-Factory's replace_eos has it, else eos stays what it is."""
        own = self.special_ids | self._added_ids
        ids = [i for i in map(self.token_id, stop_words) if i in own and i < (self.rows or self.vocab_size)]
        replaces = ids and self.token(ids[0]) == stop_words[0]
        eos = stop_words[0] if replaces else self.eos_token
        return eos, tuple(dict.fromkeys([*ids[: bool(replaces)], *self.stop_ids, *ids]))

    def save(self, folder: str | Path, chat_template: str | None = None, eos_token: str | None = None):
        """Copy the tokenizer's files into `folder`; chat_template and eos_token replace those that came with
        them, in every file that names one."""
        if self.folder is None:
            raise ValueError("this tokenizer was not loaded from a folder, so there are no files to copy")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name in TOKENIZER_FILES if (self.folder / name).is_file()]
        if chat_template is None:
            named = filter(Path.is_file, self.folder.glob(NAMED_TEMPLATES))
            names += [str(path.relative_to(self.folder)) for path in named]
        if self.folder.resolve() == folder.resolve():
            names = []
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)
        changes = {} if eos_token is None else {"eos_token": eos_token}
        if (folder / "special_tokens_map.json").exists():
            _change_json(folder / "special_tokens_map.json", changes)
        # In both places: older transformers read only the configuration, newer ones prefer the file.
        written, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if chat_template is not None:
            written.write_text(chat_template, encoding="utf-8")
        if chat_template is not None or (written.name in names and "chat_template" in _read_json(config)):
            changes["chat_template"] = written.read_text(encoding="utf-8")
        _change_json(config, changes)


def _without_prefix_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
    """The same model without the space that SentencePiece puts before the first word; None if it puts none
    there. It has no special tokens: it is only used for text that contains none."""
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    parts = {name: json.loads(part.__getstate__()) if part else None for name, part in parts.items()}
    changed = {name: _drop_prefix(part) for name, part in parts.items()}
    if changed == parts:
        return None
    empty = dict.fromkeys(("truncation", "padding", "post_processor", "decoder")) | {"version": "1.0"}
    empty |= {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    shell = tokenizers.Tokenizer.from_str(json.dumps(empty | changed))
    continuation = tokenizers.Tokenizer(backend.model)
    for name in changed:
        if changed[name] is not None:
            setattr(continuation, name, getattr(shell, name))
    return continuation


def _drop_prefix(entry: dict | None) -> dict | None:
    if entry is None or entry["type"] == "Prepend":
        return None
    if entry["type"] == "Metaspace":
        return {**entry, "prepend_scheme": "never"}
    if entry["type"] == "ByteLevel":
        return {**entry, "add_prefix_space": False}
    for key in ("normalizers", "pretokenizers"):
        if key in entry:
            kept = [_drop_prefix(item) for item in entry[key]]
            return {**entry, key: [item for item in kept if item is not None]}
    return entry


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; expected a checkpoint with tokenizer.json")
    if path.is_file():
        small(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            why = f"the tokenizers library {tokenizers.__version__} cannot read it ({error})"
            way_out = "Download the file again, or update the library if the file is newer."
            raise UserError(f"{path}: {why}. {way_out}") from error
        with located(str(path)):
            _refuse_endless(backend)
        return backend
    present = sorted(p.name for p in folder.iterdir() if "token" in p.name or p.name in TOKENIZER_FILES)
    found = f"found {', '.join(present)}" if present else "no tokenizer file at all is there"
    write = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}') of transformers"
    if (folder / "tokenizer.model").exists():
        found = "there is tokenizer.model"
        write += " with sentencepiece; or take a GGUF file of the model (model_name_or_path=model.gguf)"
    missing = f"{folder}: tokenizer.json is missing ({found})"
    raise UserError(f"{missing}. Copy it from the model's page, or write it with {write}")


ENDLESS = r"(?:[*+]|\{\d+,\})"  # a repetition without an upper end
MOST_GROWTH = 1000.0  # of a text by all the replacements of a normalizer; SentencePiece's space grows it by 1


def _refuse_endless(backend: tokenizers.Tokenizer) -> None:
    """UserError for patterns that take 2^n steps for n letters, such as (a+)+, and for replacements that make
    gigabytes of a word: nothing can stop the library once it has begun."""
    growth = 1.0
    parts = [part for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder) if part]
    waiting = [json.loads(part.__getstate__()) for part in parts]
    while waiting:
        entry = waiting.pop()
        waiting += (p for key in ("normalizers", "pretokenizers", "decoders") for p in entry.get(key, ()))
        map_of_letters = base64.b64decode(entry.get("precompiled_charsmap") or "")
        begin = 4 + int.from_bytes(map_of_letters[:4], "little")  # of what stands for them, behind the tree
        growth *= max(map(len, map_of_letters[begin:].split(b"\0"))) or 1
        pattern = entry.get("pattern")
        if isinstance(pattern, dict):
            growth *= max(1.0, len(entry.get("content", "")) / max(1, len(pattern.get("String", ""))))
            text = pattern.get("Regex", "")
            refuse(_backtracks(text), f"the pattern {text!r} repeats a repetition, which may take for ever")
    refuse(growth > MOST_GROWTH, f"its normalizer or decoder makes a text up to {growth:.0f} times as long")


def _backtracks(pattern: str) -> bool:
    """Whether a group that holds an endless repetition is itself repeated without end."""
    text = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)  # an escape, a class: a letter
    while (group := re.search(rf"\(([^()]*)\)({ENDLESS})?", text)) is not None:
        endless = re.search(ENDLESS, group[1]) is not None
        if endless and group[2]:
            return True
        text = text[: group.start()] + ("x+" if endless else "x") + (group[2] or "") + text[group.end() :]
    return False


def _read_json(path: Path) -> dict:
    values = json_reader.read(path, way_out="download the file again") if path.is_file() else {}
    check(values, FIELDS, f"{path}: ")
    for key in (key for key in NAMES if isinstance(values.get(key), dict)):
        check({"content": None} | values[key], FLAGS, f"{path}: {key}: ")
    return values


def _change_json(path: Path, changes: dict) -> None:
    values = _read_json(path)
    if any(values.get(key) != value for key, value in changes.items()):
        text = json.dumps(values | changes, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _token_text(value) -> str | None:
    """A token's text from either spelling: "</s>" or {"content": "</s>", ...}."""
    if isinstance(value, dict):
        check({"content": None} | value, FLAGS, f"{TOKENIZER_FILES[1]}: a token of {LISTS[1]}: ")
        value = value["content"]
    return value if isinstance(value, str) and value else None


def as_ids(value) -> list[int]:
    """[7] of 7, [7, 8] of itself, [] of null: the two spellings of eos_token_id."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _add_listed_tokens(backend: tokenizers.Tokenizer, folder: Path, config: dict, special_map: dict) -> list:
    """Tokens that only the other files list, and the flags that they give to any token, as transformers takes
    them: where there is an added_tokens_decoder, special_tokens_map.json counts for nothing. Gives names that
    are no tokens."""
    listed = config.get("added_tokens_decoder")
    entries = (listed or {}).items() if isinstance(listed or {}, dict) else [("", None)]
    wrong = not all(i.isdecimal() and isinstance(entry, dict) and _token_text(entry) for i, entry in entries)
    refuse(wrong, "tokenizer_config.json: added_tokens_decoder: expected id -> {content, flags}")
    names = config if listed is not None else config | special_map
    extra = names.get("extra_special_tokens") or names.get("additional_special_tokens") or []
    named = [value for key, value in names.items() if key.endswith("_token")] + [*_own_names(names).values()]
    special, has_name = {}, set(map(_token_text, named))
    for entry in [*named, *([] if isinstance(extra, dict) else extra)]:
        if (text := _token_text(entry)) is not None:
            special[text] = _added_token(entry if isinstance(entry, dict) else {"content": text}, True)

    stored = backend.get_added_tokens_decoder()
    known = {token.content: repr(token) for token in stored.values()}
    entries = {int(i): _added_token(entry) for i, entry in (listed or {}).items()}
    if not entries:
        more = _read_json(folder / "added_tokens.json")
        check(more, dict.fromkeys(more, Field(int, 0)), "added_tokens.json: ")
        entries = {i: _added_token({"content": t}, t in special) for t, i in more.items()}
    if listed is None:
        entries |= stored
    for token_id, token in sorted(entries.items()):
        # a list of special tokens changes nothing of what tokenizer.json has, a name does
        token.special |= token.content in (has_name if token.content in known else special)
        if known.get(token.content) == repr(token):
            continue
        known[token.content] = repr(token)
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            due = f"{token.content!r} should have id {token_id} (tokenizer_config.json or added_tokens.json)"
            other = f"but tokenizer.json leads to id {found}: files of different tokenizers"
            raise UserError(f"{due}, {other}")
    # A name without a row in the vocabulary would get an id behind the embedding table: leave it out.
    rows = [t for text, t in special.items() if text not in known and backend.token_to_id(text) is not None]
    backend.add_tokens(rows)
    return [text for text in special if text not in known and text not in rows]


def _added_token(entry: dict, special: bool | None = None) -> tokenizers.AddedToken:
    check(entry, FLAGS, f"{TOKENIZER_FILES[1]}: added_tokens_decoder or {LISTS[1]}: {entry['content']!r}: ")
    flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")}
    flags |= {} if special is None else {"special": special}
    flags["normalized"] = bool(entry.get("normalized", not flags["special"]))
    return tokenizers.AddedToken(entry["content"], **flags)


def _named_tokens(*sources: dict) -> dict[str, str]:
    """{"sep_token": text, ...} of the special tokens that these files name; bos and eos go their own way."""
    found = {}
    for source in sources:
        named = {key: value for key, value in source.items() if key.endswith("_token")} | _own_names(source)
        found |= {key: _token_text(value) for key, value in named.items()}
    apart = ("bos_token", "eos_token")
    return {key: text for key, text in found.items() if text is not None and key not in apart}


def _own_names(source: dict) -> dict:
    """Special tokens that have names of the model's own, in transformers 4's spelling and in 5's."""
    found = (source.get(key) for key in ("extra_special_tokens", "model_specific_special_tokens"))
    names = {name: token for each in found if isinstance(each, dict) for name, token in each.items()}
    check(names, dict.fromkeys(names, Field(str | dict)), f"{TOKENIZER_FILES[1]}: {LISTS[0]} or {LISTS[2]}: ")
    return names


def _chat_template(folder: Path, config: dict) -> str | dict[str, str] | None:
    """The entry of tokenizer_config.json, one or several by name; the files chat_template.jinja and
    additional_chat_templates/NAME.jinja take its place, where there is one of them."""
    found, where = config.get("chat_template"), folder / "tokenizer_config.json"
    if isinstance(found, list):
        wrong = not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in found)
        refuse(wrong, f"{where}: chat_template: expected entries of name, template")
        found = {entry["name"]: entry.get("template") for entry in found}
    named = found if isinstance(found, dict) else {"default": found} if found is not None else {}
    wrong = not all(isinstance(text, str) for text in named.values())
    refuse(wrong, f"{where}: chat_template: expected text, or templates of text by name")
    files = {path.stem: path for path in sorted(folder.glob(NAMED_TEMPLATES)) if path.is_file()}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    named = {} if files else named
    for name, path in files.items():
        try:
            named = {**named, name: small(path).read_text(encoding="utf-8")}
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error}). Download the file again.") from error
    return named["default"] if named.keys() == {"default"} else named or None

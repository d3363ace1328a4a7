"""Text while ids arrive, never half a character: the decoder of tokenizer.json, one piece at a time.

Each decoder of the `tokenizers` library is a step with feed(piece) -> pieces that are final, and end() ->
what it held back. Source: the decoders of huggingface/tokenizers 0.23. Made by tokenizer.Tokenizer.stream().
"""

import codecs
import json
import re

import tokenizers

from options.errors import UserError


class StreamDecoder:
    """Text of ids that arrive one by one. push() returns the text that is final; flush() the rest.

    The concatenation equals Tokenizer.decode of all ids. Each push costs the same however long the text is.
    A run of SentencePiece byte tokens is held until it ends, because decode turns the whole run into
    replacement characters when any of its bytes is wrong.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool):
        added = backend.get_added_tokens_decoder()
        self.skipped = frozenset(i for i, token in added.items() if skip_special and token.special)
        self._backend, self._steps = backend, _decoder_steps(backend)

    def push(self, token_id: int) -> str:
        token_id = int(token_id)
        token = None if token_id in self.skipped else self._backend.id_to_token(token_id)
        return "" if token is None else _fed(self._steps, [token])

    def settle(self) -> str:
        """What is held back of whole characters; after it, another byte may no longer spoil them."""
        pieces: list[str] = []
        for step in self._steps:
            pieces = [text for piece in pieces for text in step.feed(piece)] + step.settle()
        return "".join(pieces)

    def flush(self) -> str:
        return _fed(self._steps, [], end=True)


def readable(backend: tokenizers.Tokenizer, token: str) -> str:
    """One token for people: spaces kept, bytes that are no whole character as <0xE6><0x97>."""
    steps = _decoder_steps(backend, keep_spaces=True)
    text = _fed(steps, [token]) + _fed(steps, [], end=True)
    if "\ufffd" not in text:
        return text
    if not isinstance(steps[-1], _ByteLevel):
        return token  # SentencePiece spells a byte as <0xE6> itself
    return "".join(f"<0x{BYTE_OF_CHARACTER[character]:02X}>" for character in token)


def _fed(steps: list, pieces: list[str], end: bool = False) -> str:
    """What is final after these pieces; with `end` what the steps held back too."""
    for step in steps:
        pieces = [text for piece in pieces for text in step.feed(piece)] + (step.end() if end else [])
    return "".join(pieces)


class _Step:
    """A decoder step of `tokenizers` that gets one piece of text at a time. This one is Fuse: no change."""

    def feed(self, piece: str) -> list[str]:
        """The pieces that are final after `piece`."""
        return [piece]

    def end(self) -> list[str]:
        """What was held back."""
        return []

    def settle(self) -> list[str]:
        """What was held back and is whole characters."""
        return []


class _Replace(_Step):
    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def feed(self, piece: str) -> list[str]:
        return [piece.replace(self.old, self.new)]


class _ByteFallback(_Step):
    """<0xE6><0x97><0xA5> -> one character; a run that is not UTF-8 -> one replacement character per byte."""

    def __init__(self):
        self.held = bytearray()

    def feed(self, piece: str) -> list[str]:
        match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)
        if match is None:
            return [*self.end(), piece]
        self.held.append(int(match.group(1), 16))
        return []

    def end(self) -> list[str]:
        if not self.held:
            return []
        run, self.held = bytes(self.held), bytearray()
        try:
            return [run.decode("utf-8")]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)

    def settle(self) -> list[str]:
        try:
            self.held.decode("utf-8")
        except UnicodeDecodeError:
            return []
        return self.end()


class _Strip(_Step):
    """Remove up to `start` leading and `stop` trailing copies of a character from the fused text."""

    def __init__(self, content: str, start: int, stop: int):
        self.content, self.start, self.stop = content, start, stop
        self.held = ""

    def feed(self, piece: str) -> list[str]:
        while self.start and piece:
            if piece[0] != self.content:
                self.start = 0
            else:
                piece, self.start = piece[1:], self.start - 1
        piece = self.held + piece
        trailing = min(self.stop, len(piece) - len(piece.rstrip(self.content)))
        self.held = piece[len(piece) - trailing :]
        return [piece[: len(piece) - trailing]]


class _StripEach(_Strip):
    """The same for every piece by itself: a Strip that stands before Fuse."""

    def feed(self, piece: str) -> list[str]:
        return _Strip(self.content, self.start, self.stop).feed(piece)


class _Metaspace(_Step):
    """U+2581 -> space; in the first piece it is dropped where encoding had put it there."""

    def __init__(self, replacement: str, drop_first: bool):
        self.replacement, self.drop_next = replacement, drop_first

    def feed(self, piece: str) -> list[str]:
        text = piece.replace(self.replacement, "" if self.drop_next else " ")
        self.drop_next = False
        return [text]


class _ByteLevel(_Step):
    """GPT-2's printable stand-ins for bytes -> UTF-8; a token with any other character stands for itself."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, piece: str) -> list[str]:
        known = all(character in BYTE_OF_CHARACTER for character in piece)
        raw = bytes(BYTE_OF_CHARACTER[character] for character in piece) if known else piece.encode("utf-8")
        return [self.decoder.decode(raw)]

    def end(self) -> list[str]:
        return [self.decoder.decode(b"", final=True)]


class _Spaces(_Step):
    """No decoder: tokens joined by a space."""

    def __init__(self):
        self.gap = ""

    def feed(self, piece: str) -> list[str]:
        text, self.gap = self.gap + piece, " "
        return [text]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's bytes_to_unicode: printable Latin-1 bytes stand for themselves, the others from U+0100 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _decoder_steps(backend: tokenizers.Tokenizer, keep_spaces: bool = False) -> list:
    """The backend's decoder as a list of fresh steps; keep_spaces leaves out what drops a leading space."""
    if backend.decoder is None:
        return [_Spaces()]
    state = json.loads(backend.decoder.__getstate__())
    steps: list = []
    fused = False
    for entry in state["decoders"] if state["type"] == "Sequence" else [state]:
        kind = entry["type"]
        if kind == "Replace" and "String" in entry["pattern"]:
            steps.append(_Replace(entry["pattern"]["String"], entry["content"]))
        elif kind == "ByteFallback":
            steps.append(_ByteFallback())
        elif kind == "Fuse":
            steps.append(_Step())
            fused = True
        elif kind == "Strip" and not keep_spaces:
            strip = _Strip if fused else _StripEach
            steps.append(strip(entry["content"], entry["start"], entry["stop"]))
        elif kind == "Metaspace":
            drop_first = entry.get("prepend_scheme", "always") != "never" and not keep_spaces
            steps.append(_Metaspace(entry["replacement"], drop_first))
        elif kind == "ByteLevel":
            steps.append(_ByteLevel())
        elif kind != "Strip":
            known = "ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse, Strip"
            way_out = f"known are {known}. Use Tokenizer.decode on the finished ids."
            raise UserError(f"tokenizer.json: decoder {kind!r} cannot be streamed; {way_out}")
    return steps

"""How a student's tokenizer itself begins a piece of text in the middle of a document."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedmkt.vocabulary import Encoding, Vocabulary

# Text to put before a piece. A tokenizer may treat the very beginning of a text in its own way (a dummy space), and may
# merge the piece with what stands before it; the first context after which it begins a new token is taken.
CONTEXTS = ("\n", "a", ")", "0")
BATCH_TEXTS = 4096
BATCH_CHARACTERS = 1 << 16  # less than a second even for a tokenizer that is just fast enough to be accepted


@dataclass(frozen=True, slots=True)
class Piece:
    """The student id that begins a token's bytes, and how many of them it covers."""

    id: int
    covered: int


def ids_by_bytes(student: Vocabulary, tick: Callable[[], None] = lambda: None) -> dict[bytes, int]:
    """The id that stands for each byte string among a vocabulary's ordinary tokens.

    Where several ids have the same bytes: the one that the tokenizer itself produces for them, else the smallest.
    `tick()` is called several times a second; what it raises ends the search.
    """
    chosen: dict[bytes, int] = {}
    repeated: dict[bytes, set[int]] = {}
    for index, token in enumerate(student.tokens):
        if token and chosen.setdefault(token, index) != index:
            repeated.setdefault(token, {chosen[token]}).add(index)
    tokens = [token for token in repeated if _is_text(token)]
    for token, piece in zip(tokens, _tokenized(student, tokens, lambda done: tick()), strict=True):
        if piece is not None and piece.id in repeated[token]:
            chosen[token] = piece.id
    return chosen


def first_pieces(
    student: Vocabulary, tokens: Sequence[bytes], known: dict[bytes, int], progress: Callable[[int], None]
) -> list[Piece | None]:
    """For each byte string the student token that it begins with, None when there is none.

    Text goes through the student's own tokenizer. Bytes that are no text by themselves (part of a character), and text
    that the student cannot represent exactly, take the longest of the `known` tokens that is a prefix of them; after
    that, text takes whatever ordinary token the tokenizer begins it with (lower-cased, normalised). `progress` gets the
    number of strings done.
    """
    text_numbers = [number for number, token in enumerate(tokens) if _is_text(token)]
    own: list[Piece | None] = [None] * len(tokens)
    others = len(tokens) - len(text_numbers)
    texts = [tokens[number] for number in text_numbers]
    for number, piece in zip(
        text_numbers, _tokenized(student, texts, lambda done: progress(others + done)), strict=True
    ):
        own[number] = piece
    return [_begun(student, token, piece, known) for token, piece in zip(tokens, own, strict=True)]


def _begun(student: Vocabulary, token: bytes, own: Piece | None, known: dict[bytes, int]) -> Piece | None:
    if own is not None and token.startswith(student.tokens[own.id]):
        return Piece(own.id, len(student.tokens[own.id]))
    for length in range(len(token), 0, -1):
        if token[:length] in known:
            return Piece(known[token[:length]], length)
    return own


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _tokenized(student: Vocabulary, tokens: Sequence[bytes], progress: Callable[[int], None]) -> list[Piece | None]:
    """The first piece of each text according to the student's tokenizer; None where it is unknown or not a piece."""
    found: list[Piece | None] = [None] * len(tokens)
    waiting = list(range(len(tokens)))
    for context, before in _usable_contexts(student):
        still: list[int] = []
        done = len(tokens) - len(waiting)
        for batch in _batches(waiting, tokens):
            texts = [context + tokens[number].decode() for number in batch]
            for number, encoding in zip(batch, student.encode_batch(texts, add_bos=False), strict=True):
                found[number] = _after(student, before, len(context), encoding)
                if found[number] is None:
                    still.append(number)
            done += len(batch)
            progress(done - len(still))
        waiting = still
    return found


def _batches(waiting: list[int], tokens: Sequence[bytes]) -> Iterator[list[int]]:
    """The numbers of the waiting tokens, in batches of bounded number and size."""
    batch: list[int] = []
    size = 0
    for number in waiting:
        batch.append(number)
        size += len(tokens[number])
        if len(batch) == BATCH_TEXTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _usable_contexts(student: Vocabulary) -> Iterator[tuple[str, list[int]]]:
    """Contexts that the student represents exactly, with their ids."""
    for context, encoding in zip(CONTEXTS, student.encode_batch(CONTEXTS, add_bos=False), strict=True):
        if encoding.exact and encoding.ids.size:
            yield context, encoding.ids.tolist()


def _after(student: Vocabulary, before: list[int], length: int, encoding: Encoding) -> Piece | None:
    """The token after the ids `before` of a context of `length` bytes, if the tokenizer keeps them apart."""
    place = len(before)
    if encoding.ids.size <= place or encoding.ids[:place].tolist() != before:
        return None
    index = int(encoding.ids[place])
    if index in student.roles:
        return None
    return Piece(index, max(0, int(encoding.ends[place]) - length))

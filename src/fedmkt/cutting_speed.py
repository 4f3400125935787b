"""Whether a tokenizer from another party cuts text in reasonable time: asked once, when it is read.

Its regular expressions are the other party's. The library bounds what one attempt to match may cost, and panics beyond
that; an expression whose cost grows with the square or cube of a run of equal characters stays below the bound and
would hold up whoever cuts a text with it. So runs of all kinds are cut here, short ones first.
"""

import time
from collections.abc import Callable
from typing import ClassVar

from fedmkt.token_bytes import UnsupportedVocabulary

RUNS = (
    *("a", "A", "é", "日", "ا", "0", " ", "\t", "\n", "\r\n", ".", "'", "-", "_", "=", "<", "▁", "😀", "\u0301"),
    *("aA", "a0", "a ", " .", "'s", "日本", " \n"),
)
LENGTHS: tuple[int, ...] = (
    64,
    256,
    1024,
    4096,
)  # characters; a quarter at a time, so that a slow one is met while it is cheap
MOST_S_PER_CHARACTER = 1 / 4096  # of processor time; real tokenizers need a five-hundredth of that
LEAST_S = 0.05


class SlowTokenizer(UnsupportedVocabulary):
    code: ClassVar[str] = "vocabulary.too_slow"
    title: ClassVar[str] = "This tokenizer is too slow"


def check_cutting_speed(cut: Callable[[str], object]) -> None:
    """Raises SlowTokenizer when `cut`, which works in the thread that calls it, takes too long for some run."""
    for length in LENGTHS:
        allowed_s = max(LEAST_S, length * MOST_S_PER_CHARACTER)
        for run in RUNS:
            text = (run * length)[:length] + "\0"  # what ends a run makes an expression take back what it has matched
            began = time.thread_time()
            cut(text)
            taken_s = time.thread_time() - began
            if taken_s > allowed_s:
                raise SlowTokenizer(
                    f"it cuts {length} characters ({run!r}, repeated) in {taken_s:.2f} s of processor time, at most "
                    f"{allowed_s:.2f} s is allowed; simplify the regular expressions in its tokenizer.json"
                )

"""Other parties' vocabularies, read and used in a process of their own.

A tokenizer.json that somebody made to do harm gets past every check that can be made beforehand: the tokenizer library
allocates what it says, recurses as deep as it says, matches its regular expressions, and sometimes ends the process.
So it sees such a file in a child process alone, with bounds on processor time and memory. A child that exceeds them, or
dies, costs its maker a refusal; the next request gets a new child.

`VocabularyProcess` is the parent's end; the child runs as `python -m fedmkt.vocabulary_process`. Between them go
frames: two little-endian uint64 with the lengths of what follows, a JSON object, and bytes.
"""

import hashlib
import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import IO, Any, ClassVar, Self

import numpy as np

from fedmkt.cutting_speed import SlowTokenizer
from fedmkt.protocol import MAX_VOCABULARY_BYTES
from fedmkt.token_bytes import UnsupportedVocabulary
from fedmkt.vocabulary import Encoding, MalformedVocabulary, Vocabulary

HEAD = struct.Struct("<QQ")
KEPT = 4  # vocabularies that a child holds; one that it has dropped is sent again
WALL_FACTOR = 5  # of the processor time that a request may take: a loaded machine's patience, and the end of a deadlock
FEW_THREADS = {  # each one reserves address space, of which the child has a bounded amount on a machine of any size
    "RAYON_NUM_THREADS": str(min(4, os.cpu_count() or 1)),
    "MALLOC_ARENA_MAX": "4",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# The child needs these; credentials, which stand in variables too, it does not.
VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME", "TOKENIZERS_PARALLELISM")


class FatalVocabulary(UnsupportedVocabulary):
    code: ClassVar[str] = "vocabulary.fatal"
    title: ClassVar[str] = "This tokenizer ends the process that reads it"


REFUSALS = {kind.code: kind for kind in (UnsupportedVocabulary, MalformedVocabulary, SlowTokenizer)}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one request: processor time (more for many characters), and the child's address space."""

    cpu_s: float = 60.0
    characters_per_s: float = 20_000.0  # real tokenizers cut a hundred times as many
    memory_bytes: int = 4 << 30

    def for_texts(self, texts: Sequence[str]) -> float:
        """Seconds of processor time to cut them."""
        return self.cpu_s + sum(map(len, texts)) / self.characters_per_s


class VocabularyProcess:
    """Starts its child when it is needed; safe to use from several threads, which wait for each other."""

    def __init__(self, bounds: Bounds = Bounds()) -> None:
        self._bounds = bounds
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child; a later request starts another."""
        with self._lock:
            self._end()

    def read(self, artifact: bytes) -> Vocabulary:
        """As `Vocabulary.from_bytes`, with the same refusals; also later, its texts are cut in the child.

        Raises FatalVocabulary when reading it exceeds a bound or ends the child.
        """
        if len(artifact) > MAX_VOCABULARY_BYTES:
            raise MalformedVocabulary(
                f"the vocabulary has {len(artifact)} bytes, at most {MAX_VOCABULARY_BYTES} expected"
            )
        about, blob = self._ask({"do": "read"}, artifact, self._bounds.cpu_s)
        lengths = np.frombuffer(blob, dtype="<i4", count=about["size"])
        at, tokens = lengths.nbytes, []
        for length in lengths.tolist():
            tokens.append(blob[at : at + length])
            at += length
        roles = MappingProxyType({int(index): role for index, role in about["roles"].items()})
        cutter = _CutterApart(self, blob[at:])
        return Vocabulary(
            tuple(tokens), roles, about["bos_id"], about["eos_id"], about["fingerprint"], cutter.artifact, cutter
        )

    def cut(self, artifact: bytes, texts: list[str]) -> list[Encoding]:
        """Texts in a vocabulary that was read before; FatalVocabulary as there."""
        datas = [text.encode() for text in texts]
        about = {"do": "cut", "digest": hashlib.sha256(artifact).hexdigest(), "lengths": [len(data) for data in datas]}
        cpu_s = self._bounds.for_texts(texts)
        said, blob = self._ask(about, b"".join(datas), cpu_s)
        if said.get("unknown"):  # to a new child, or to one that has dropped it
            self._ask({"do": "read"}, artifact, self._bounds.cpu_s)
            said, blob = self._ask(about, b"".join(datas), cpu_s)
        ids, ends = np.split(np.frombuffer(blob, dtype="<i4").astype(np.int32), 2)
        splits = np.cumsum(said["counts"])[:-1]
        parts = zip(np.split(ids, splits), np.split(ends, splits), said["exact"], strict=True)
        return [Encoding(*each) for each in parts] if texts else []

    # ------------------------------------------------------------------------------------------ the child

    def _ask(self, about: dict[str, Any], blob: bytes, cpu_s: float) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            said, answer = self._exchange({**about, "cpu_s": cpu_s}, blob, cpu_s)
        if "refused" in said:
            raise REFUSALS[said["refused"]](said["detail"])
        return said, answer

    def _exchange(self, about: dict[str, Any], blob: bytes, cpu_s: float) -> tuple[dict[str, Any], bytes]:
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        too_long = threading.Timer(cpu_s * WALL_FACTOR, child.kill)
        too_long.start()
        try:
            _write(child.stdin, about, blob)
            return _read(child.stdout)
        except (BrokenPipeError, EOFError):
            status = child.wait()
            self._end()
            raise FatalVocabulary(
                f"the process that worked on it {self._how(status, cpu_s)}; simplify tokenizer.json: its normalizers, "
                "regular expressions and sizes"
            ) from None
        except BaseException:  # the frames no longer fit together
            self._end()
            raise
        finally:
            too_long.cancel()

    def _how(self, status: int, cpu_s: float) -> str:
        if status == -signal.SIGXCPU:
            return f"took more than the {cpu_s:.0f} s of processor time that it may"
        if status == -signal.SIGKILL:
            return f"was ended after {cpu_s * WALL_FACTOR:.0f} s"
        cause = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"ended with {cause}; it may take {self._bounds.memory_bytes >> 20} MiB of memory"

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None:
            environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
            self._child = subprocess.Popen(  # noqa: S603 - this module
                [sys.executable, "-P", "-m", __name__, str(self._bounds.memory_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # where the library writes pages about what it fails on
                env={**environment, **FEW_THREADS},
                start_new_session=True,
            )
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


@dataclass(frozen=True, eq=False)
class _CutterApart:
    process: VocabularyProcess
    artifact: bytes

    def cut(self, texts: list[str]) -> list[Encoding]:
        return self.process.cut(self.artifact, texts)


# ------------------------------------------------------------------------------------------------ frames


def _write(file: IO[bytes], about: dict[str, Any], blob: bytes) -> None:
    head = json.dumps(about).encode()
    file.write(HEAD.pack(len(head), len(blob)) + head)
    file.write(blob)
    file.flush()


def _read(file: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Raises EOFError at the end of the file, also in the middle of a frame."""
    sizes = HEAD.unpack(_exactly(file, HEAD.size))
    about = json.loads(_exactly(file, sizes[0]))
    return about, _exactly(file, sizes[1])


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes came")
    return data


# ------------------------------------------------------------------------------------------------ the other end


class _Reader:
    """The child: answers one request after the other until its parent is gone."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Vocabulary] = OrderedDict()

    def answer(self, about: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            return self._read(blob) if about["do"] == "read" else self._cut(about, blob)
        except UnsupportedVocabulary as refusal:
            return {"refused": refusal.code, "detail": refusal.detail}, b""

    def _read(self, artifact: bytes) -> tuple[dict[str, Any], bytes]:
        found = Vocabulary.from_bytes(artifact)
        canonical = found.to_bytes()
        self._kept[hashlib.sha256(canonical).hexdigest()] = found
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        about = {name: getattr(found, name) for name in ("size", "bos_id", "eos_id", "fingerprint")}
        blob = found.byte_lengths.astype("<i4").tobytes() + b"".join(found.tokens) + canonical
        return {**about, "roles": dict(found.roles)}, blob

    def _cut(self, about: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        found = self._kept.get(about["digest"])
        if found is None:
            return {"unknown": True}, b""
        self._kept.move_to_end(about["digest"])
        at, texts = 0, []
        for length in about["lengths"]:
            texts.append(blob[at : at + length].decode())
            at += length
        cut = found._cutter.cut(texts)
        said = {"counts": [len(each.ids) for each in cut], "exact": [each.exact for each in cut]}
        columns = [[each.ids for each in cut], [each.ends for each in cut]]
        return said, b"".join(each.astype("<i4").tobytes() for column in columns for each in column)


def main(arguments: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(arguments[0]), int(arguments[0])))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = _Reader()
    while True:
        try:
            about, blob = _read(sys.stdin.buffer)
        except EOFError:
            return
        # Of this request: what the ones before have taken counts for nothing. SIGXCPU ends the process.
        ends = math.ceil(time.process_time() + about["cpu_s"])
        resource.setrlimit(resource.RLIMIT_CPU, (ends, resource.RLIM_INFINITY))
        _write(sys.stdout.buffer, *reader.answer(about, blob))


if __name__ == "__main__":
    main(sys.argv[1:])

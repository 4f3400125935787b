"""How many tokens fit into one forward and backward pass: measured on the first samples of a training, not guessed.

On CUDA the allocator counts. Elsewhere every tensor is counted as it comes and goes, which takes nothing but the shapes
into account: the same training gives the same number on the same machine, and with it the same bytes.
"""

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_TOKENS, FEWEST_TOKENS = 16384, 64  # in one pass; more of them are no faster, fewer are no use
OF_A_DEVICE, OF_A_MACHINE = 0.8, 0.25  # shares that one pass may take: of what is free, of all there is
CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


def tokens_at_once(device: torch.device, processes: int, tokens: int, work: Callable[[int], object]) -> int:
    """Padded tokens in one pass, a power of two. `work(n)` passes n samples of `tokens` tokens, n = 1 and 2.

    `processes` share the machine's memory, or have a device each.
    """
    work(1)  # what is allocated once, for good, counts for neither
    one = peak_bytes(device, lambda: work(1))
    try:
        two = peak_bytes(device, lambda: work(2))
    except torch.OutOfMemoryError:
        return FEWEST_TOKENS  # a sample is never cut, so this is one at a time
    each = max(1, two - one)
    room = _room(device, processes) - (one - each)
    return power_of_two(room * tokens // each)


def power_of_two(tokens: int) -> int:
    """Rounded down, within the bounds."""
    return max(FEWEST_TOKENS, 1 << (min(MOST_TOKENS, max(1, tokens)).bit_length() - 1))


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The most that `work` holds at a time, above what was there before."""
    if device.type != "cuda":
        with _Counted() as counted:
            work()
        return int(counted.peak)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return int(torch.cuda.max_memory_allocated(device) - before)


def _room(device: torch.device, processes: int) -> int:
    if device.type != "cuda":
        return int(OF_A_MACHINE * machine_bytes() / processes)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(OF_A_DEVICE * (torch.cuda.mem_get_info(device)[0] + unused))


def machine_bytes() -> int:
    """Of memory that this process may use: the machine's, or its container's."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CONTROL_GROUP.read_text().strip() if CONTROL_GROUP.is_file() else "max"
    return there if limit == "max" else min(there, int(limit))


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own gap
    """Bytes of the tensors that were made inside and are still held, and the most there were of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own gap
        self.held = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(_storage(each)) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and id(_storage(each)) not in given | self._seen:
                self._add(_storage(each))
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.held -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()

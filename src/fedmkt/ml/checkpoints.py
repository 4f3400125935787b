"""Taking up an interrupted training where it was: one file with weights, optimizer and the number of steps done."""

import json
import logging
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmkt.ml.party import Party, Snapshot
from fedmkt.stopping import StopFlag

log = logging.getLogger(__name__)

WEIGHT, MOMENT = "weight ", "moment "


class Checkpoints:
    """Of one training at a time, which `key` names: another key's file is not taken up.

    The training that goes on ends bit for bit where an unbroken one ends, as long as samples and settings are the same.
    """

    def __init__(self, path: Path, key: str, *, interval_s: float, stop: StopFlag | None = None) -> None:
        """Saves every `interval_s`, and at once when `stop` is set, since the training is about to end."""
        self._path = path
        self._key = key
        self._interval_s = interval_s
        self._stop = stop
        self._saved_at = time.monotonic()

    def resume(self, party: Party) -> int:
        """Put the party where the training had come to; returns the steps done. Nothing saved: 0, and no change."""
        self._saved_at = time.monotonic()
        if not self._path.exists():
            return 0
        try:
            with safe_open(self._path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            log.warning("checkpoint.unreadable", extra={"reason": str(error)})
            return 0
        if about["key"] != self._key or about["steps"] - about["steps_done"] != party.steps:
            return 0
        party.restore(Snapshot(_named(tensors, WEIGHT), _named(tensors, MOMENT), about["steps"]))
        party.pass_tokens = about.get("pass_tokens")  # sums in other portions would round differently
        log.info("checkpoint.resumed", extra={"steps_done": about["steps_done"]})
        return int(about["steps_done"])

    def offer(self, party: Party, steps_done: int, total: int) -> None:
        """After a step: save the party if it is time. The last step needs no saving; what follows is quick."""
        stopping = self._stop is not None and self._stop.is_set
        due = stopping or time.monotonic() - self._saved_at >= self._interval_s
        if due and steps_done < total:
            self._save(party.snapshot(), steps_done, party.pass_tokens)
            self._saved_at = time.monotonic()

    def _save(self, snapshot: Snapshot, steps_done: int, pass_tokens: int | None) -> None:
        tensors = {f"{WEIGHT}{name}": tensor for name, tensor in snapshot.weights.items()}
        tensors |= {f"{MOMENT}{name}": tensor for name, tensor in snapshot.moments.items()}
        about = {"key": self._key, "steps": snapshot.steps, "steps_done": steps_done, "pass_tokens": pass_tokens}
        draft = self._path.with_name(f".{self._path.name}.new")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, draft, metadata={"about": json.dumps(about)})
        draft.replace(self._path)

    def clear(self) -> None:
        """The training's result is safe elsewhere."""
        self._path.unlink(missing_ok=True)


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

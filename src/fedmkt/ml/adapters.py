"""Adapters as bytes: a deterministic tar of a PEFT folder, read without trust. No torch.

The tar holds adapter_config.json, adapter_model.safetensors and, where there is one, the model card README.md, in this
order, as plain USTAR members with nothing of this machine in their headers. Whatever else a tar can hold (links,
devices, sparse files, long names) is refused. Weights of full training are one safetensors file, the card its metadata.
"""

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedmkt.errors import Refusal

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
NAMES = (CONFIG_NAME, TENSORS_NAME, CARD_NAME)
MAX_ADAPTER_BYTES = 1 << 30
MAX_CONFIG_BYTES = 1 << 16
MAX_CARD_BYTES = 1 << 23  # a line for each of ten thousand sites, several times over
MAX_TENSORS = 100_000

# settings that change what the tensors mean; two adapters that differ in one of them do not fit together
MEANING = ("peft_type", "r", "lora_alpha", "target_modules", "fan_in_fan_out", "bias", "use_rslora", "use_dora")

Tensors = dict[str, NDArray[np.float32]]


class MalformedAdapter(Refusal):
    code: ClassVar[str] = "adapter.malformed"
    title: ClassVar[str] = "The adapter cannot be read"
    remedy: ClassVar[str] = (
        "Fetch the adapter again; one of your own making has to be a PEFT folder with float32 safetensors."
    )


class AdapterTooLarge(MalformedAdapter):
    status: ClassVar[int] = 413
    code: ClassVar[str] = "adapter.too_large"
    title: ClassVar[str] = "The adapter is too large"
    remedy: ClassVar[str] = (
        "Use a smaller LoRA rank or fewer target modules; a download that grew is broken, so fetch it again."
    )


class AdapterNotFinite(MalformedAdapter):
    code: ClassVar[str] = "adapter.nan"
    title: ClassVar[str] = "The adapter holds values that are not finite"


class AdaptersDiffer(Refusal):
    code: ClassVar[str] = "adapter.mismatch"
    title: ClassVar[str] = "The adapter does not fit"
    remedy: ClassVar[str] = (
        "Averaging and loading want one LoRA setting (rank, targets) and one base model at all sites."
    )


@dataclass(frozen=True)
class Adapter:
    """config: content of adapter_config.json; tensors: PEFT name -> float32."""

    config: Mapping[str, Any]
    tensors: Tensors


def pack_adapter(adapter: Adapter) -> bytes:
    """Same adapter, same bytes, on every machine."""
    return (
        _member(CONFIG_NAME, config_bytes(adapter.config))
        + _member(TENSORS_NAME, tensor_bytes(adapter.tensors))
        + bytes(1024)
    )


def with_card(blob: bytes, card: str) -> bytes:
    """An adapter as `Party.adapter_bytes` gives it, LoRA or weights, and its model card: same input, same bytes."""
    if blob.startswith(CONFIG_NAME.encode()):  # a tar begins with its first member's name
        return blob[:-1024] + _member(CARD_NAME, card.encode()) + blob[-1024:]
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    header["__metadata__"] = {**header.get("__metadata__", {}), CARD_NAME: card}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + blob[start:]


def config_bytes(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, sort_keys=True, indent=2).encode() + b"\n"


def tensor_bytes(tensors: Tensors) -> bytes:
    contiguous = {name: np.ascontiguousarray(tensors[name], dtype=np.float32) for name in sorted(tensors)}
    return bytes(save_tensors(contiguous, metadata={"format": "pt"}))


def unpack_adapter(blob: bytes) -> Adapter:
    """Read what another party sent: sizes bounded, names allow-listed, values finite. Raises MalformedAdapter."""
    if len(blob) > MAX_ADAPTER_BYTES:
        raise AdapterTooLarge(f"the adapter has {len(blob)} bytes, at most {MAX_ADAPTER_BYTES} are allowed")
    members = _members(blob)
    if not {CONFIG_NAME, TENSORS_NAME} <= set(members):
        raise MalformedAdapter(f"the tar holds {sorted(members)}, expected {CONFIG_NAME} and {TENSORS_NAME}")
    if len(members.get(CARD_NAME, b"")) > MAX_CARD_BYTES:
        raise AdapterTooLarge(f"{CARD_NAME} has {len(members[CARD_NAME])} bytes, at most {MAX_CARD_BYTES} are allowed")
    return Adapter(read_config(members[CONFIG_NAME]), read_tensors(members[TENSORS_NAME]))


def read_config(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterTooLarge(f"{CONFIG_NAME} has {len(data)} bytes, at most {MAX_CONFIG_BYTES} are allowed")
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedAdapter(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise MalformedAdapter(f"{CONFIG_NAME} holds a JSON {type(config).__name__}, an object expected")
    return config


def read_tensors(data: bytes) -> Tensors:
    """float32 tensors of a safetensors file, all finite."""
    try:
        tensors = load_tensors(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise MalformedAdapter(f"not a safetensors file of float32 tensors: {error}") from error
    if len(tensors) > MAX_TENSORS:
        raise AdapterTooLarge(f"{len(tensors)} tensors, at most {MAX_TENSORS} are allowed")
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise MalformedAdapter(f"tensor {name[:200]!r} is {tensor.dtype}, float32 expected")
        if not np.isfinite(tensor).all():
            raise AdapterNotFinite(
                f"tensor {name[:200]!r} has {np.count_nonzero(~np.isfinite(tensor))} values that are not finite; "
                "train again from the last good state"
            )
    return tensors


def check_fits(adapter: Adapter, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises AdaptersDiffer unless settings that matter, tensor names and shapes are those expected."""
    for key in MEANING:
        if _plain(adapter.config.get(key)) != _plain(config.get(key)):
            raise AdaptersDiffer(
                f"{key} is {adapter.config.get(key)!r}, expected {config.get(key)!r}; both must use one LoRA setting"
            )
    check_shapes(adapter.tensors, shapes)


def check_shapes(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if tensors.keys() != shapes.keys():
        odd = sorted(tensors.keys() ^ shapes.keys())
        raise AdaptersDiffer(
            f"{len(tensors)} tensors, expected {len(shapes)}; {len(odd)} names differ, the first is {odd[0][:200]!r}"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise AdaptersDiffer(f"tensor {name!r} has shape {tensors[name].shape}, expected {shape}")


def _plain(value: object) -> object:
    """Order is no difference between lists of modules."""
    return sorted(map(str, value)) if isinstance(value, list) else value


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header + data + bytes(-len(data) % 512)


def _members(blob: bytes) -> dict[str, bytes]:
    """Members of a USTAR archive until its end mark. At most three, so nothing is left to bound."""
    found: dict[str, bytes] = {}
    position = 0
    while blob[position : position + 512].strip(b"\0"):
        try:
            info = tarfile.TarInfo.frombuf(blob[position : position + 512], "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise MalformedAdapter(f"the tar header at byte {position} is broken: {error}") from error
        start = position + 512
        if info.type != tarfile.REGTYPE or info.name not in NAMES or info.name in found:
            raise MalformedAdapter(
                f"the tar holds {info.name[:100]!r} of type {info.type!r}, expected {', '.join(NAMES)} once each, as "
                "plain files"
            )
        if not 0 <= info.size <= len(blob) - start:
            raise MalformedAdapter(f"{info.name} claims {info.size} bytes, {len(blob) - start} are left")
        found[info.name] = blob[start : start + info.size]
        position = start + info.size + -info.size % 512
    return found

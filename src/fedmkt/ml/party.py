"""A party: a base model, its adapter, and the optimizer and schedule that continue from round to round."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedmkt.ml.adapters import (
    CONFIG_NAME,
    MAX_ADAPTER_BYTES,
    TENSORS_NAME,
    Adapter,
    AdapterTooLarge,
    Tensors,
    check_fits,
    check_shapes,
    config_bytes,
    pack_adapter,
    read_config,
    read_tensors,
    tensor_bytes,
    unpack_adapter,
)
from fedmkt.ml.head import PlainHead, find_plain_head
from fedmkt.ml.lora import add_lora, on_disk, reset_lora, trainable
from fedmkt.ml.models import LoadedModel, max_positions, output_head, parameter_count
from fedmkt.ml.party_folder import About, PartyFolderRefused, digests, read_about, read_file, write_party
from fedmkt.ml.quantization import NoQuantization, quantized
from fedmkt.ml.team import Team, TeamMisused
from fedmkt.protocol import LoraConfig, ModelCard
from fedmkt.vocabulary import Vocabulary

WEIGHTS_NAME = "weights.safetensors"  # full fine-tuning: the weights that differ from the base
OPTIMIZER_NAME = "optimizer.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A party's state at one moment, on the CPU: weights by name, optimizer moments by name, steps taken."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    steps: int


class Party:
    """Owns the model of a `LoadedModel`, which it changes in place: make one party per loaded model.

    With `lora`, only LoRA layers train (float32); without, every weight does (held in float32), and a copy of the base
    stays on the CPU so that the party can go back. The same seed and the same calls give the same bytes on the same
    machine. `steps` counts batches over all rounds; the learning-rate warm-up follows it.
    """

    def __init__(
        self, loaded: LoadedModel, lora: LoraConfig | None, *, seed: int, gradient_checkpointing: bool = False
    ) -> None:
        self.model: PreTrainedModel = loaded.model
        self.vocabulary: Vocabulary = loaded.vocabulary
        self.lora = lora
        self.seed = seed
        self.device = loaded.device
        self.team: Team = loaded.team
        self.pass_tokens: int | None = None  # in one forward and backward pass, once a training has measured it
        self._adapter_config: dict[str, Any] | None = None
        self._base: dict[str, Tensor] = {}
        if lora is None and (bits := quantized(self.model)) is not None:
            raise NoQuantization(
                f"a base in {bits} can only be trained by LoRA layers on top, the federation has lora null; give it "
                "LoRA settings, or leave quantize out of the LLM server's"
            )
        self.model.requires_grad_(lora is None)
        if lora is None:
            nn.Module.float(self.model)
            self._base = _copied(trainable(self.model))
        else:
            self._adapter_config = add_lora(self.model, lora, loaded.card.model_id)
        if gradient_checkpointing:
            _checkpoint_gradients(self.model)
        if self.team.sharded:
            self._shard()
        self.card: ModelCard = loaded.card.model_copy(
            update={"trainable_parameters": parameter_count(self.model, trainable=True)}
        )
        self.weights = trainable(self.model)
        self.reset()

    def _shard(self) -> None:
        """Spread the frozen base over the team's processes. LoRA layers, embeddings and head stay whole on each."""
        if self.lora is None:
            raise TeamMisused(
                "a sharded model trains LoRA layers alone, the federation has lora null; give it LoRA settings, or "
                "leave shard out of the LLM server's"
            )
        _ = self.plain_head  # found out while one process alone can pass tokens through the model
        self.team.shard(self.model, trainable(self.model).values())

    def reset(self) -> None:
        """Back to version 0: the bare base model, with a fresh optimizer."""
        if self.lora is None:
            self._put_weights(self._base)
        else:
            reset_lora(self.model, self.seed)
        self._forget_optimizer()

    # -------------------------------------------------------------------------------------------- what it can do

    @cached_property
    def head(self) -> nn.Module:
        head = output_head(self.model)
        assert head is not None  # load_base refuses models without one
        return head

    @cached_property
    def plain_head(self) -> PlainHead | None:
        return find_plain_head(self.model)

    @cached_property
    def positions(self) -> int | None:
        """Longest sequence in tokens, None where unbounded."""
        return max_positions(self.model)

    def usable_tokens(self, max_tokens: int) -> int:
        """`max_tokens`, or the model's positions where those are fewer."""
        return max_tokens if self.positions is None else min(max_tokens, self.positions)

    # -------------------------------------------------------------------------------------------- in memory

    def snapshot(self, *, moments: bool = True) -> Snapshot:
        return Snapshot(_copied(self.weights), _copied(self._moments()) if moments else {}, self.steps)

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot of this party, bit for bit: weights, optimizer moments, schedule."""
        self._put_weights(snapshot.weights)
        self._put_moments(snapshot.moments)
        self.steps = snapshot.steps

    # -------------------------------------------------------------------------------------------- on the wire

    def adapter_bytes(self) -> bytes:
        """The adapter as the federation's artifact, the same bytes for the same weights.

        LoRA: a tar of the PEFT folder. Full fine-tuning: safetensors of the weights that differ from the base.
        """
        if self._adapter_config is None:
            return tensor_bytes(self._changed())
        return pack_adapter(Adapter(self._adapter_config, self._lora_tensors()))

    def load_adapter_bytes(self, blob: bytes) -> None:
        """Take over an adapter of the same base and settings; refuses what does not fit and then changes nothing.

        Optimizer and schedule go on as they were, so an averaged adapter does not restart the warm-up every round;
        `reset` before it where they should not.
        """
        if self._adapter_config is None:
            if len(blob) > MAX_ADAPTER_BYTES:
                raise AdapterTooLarge(f"the weights have {len(blob)} bytes, at most {MAX_ADAPTER_BYTES} are allowed")
            self._put_changed(read_tensors(blob))
        else:
            self._put_lora(unpack_adapter(blob))

    # -------------------------------------------------------------------------------------------- on disk

    def save(self, folder: Path) -> None:
        """Replace `folder` by a PEFT folder (or weights.safetensors) with optimizer and schedule beside it."""
        files = {OPTIMIZER_NAME: save_tensors(_copied(self._moments()), metadata={"format": "pt"})}
        if self._adapter_config is None:
            files[WEIGHTS_NAME] = tensor_bytes(self._changed())
        else:
            files[CONFIG_NAME] = config_bytes(self._adapter_config)
            files[TENSORS_NAME] = tensor_bytes(self._lora_tensors())
        about = About(
            model_id=self.card.model_id,
            vocabulary=self.vocabulary.fingerprint,
            lora=self.lora,
            seed=self.seed,
            steps=self.steps,
            files=digests(files),
        )
        write_party(folder, about, files)

    @classmethod
    def load(cls, folder: Path, loaded: LoadedModel, *, gradient_checkpointing: bool = False) -> "Party":
        """A saved party on a freshly loaded base. Raises PartyFolderRefused if it is torn or made for another base."""
        folder, about = read_about(folder)
        base = (loaded.card.model_id, loaded.vocabulary.fingerprint)
        if (about.model_id, about.vocabulary) != base:
            raise PartyFolderRefused(
                f"{folder} was made for {about.model_id} with vocabulary {about.vocabulary}, the loaded base is "
                f"{base[0]} with vocabulary {base[1]}; load that base"
            )
        party = cls(loaded, about.lora, seed=about.seed, gradient_checkpointing=gradient_checkpointing)
        if about.lora is None:
            party._put_changed(read_tensors(read_file(folder, about, WEIGHTS_NAME)))
        else:
            config, tensors = (read_file(folder, about, name) for name in (CONFIG_NAME, TENSORS_NAME))
            party._put_lora(Adapter(read_config(config), read_tensors(tensors)))
        party._put_moments(load_tensors(read_file(folder, about, OPTIMIZER_NAME)))
        party.steps = about.steps
        return party

    # -------------------------------------------------------------------------------------------- inside

    def _lora_tensors(self) -> Tensors:
        return {on_disk(name): tensor.numpy() for name, tensor in _copied(self.weights).items()}

    def _put_lora(self, adapter: Adapter) -> None:
        assert self._adapter_config is not None
        names = {on_disk(name): name for name in self.weights}
        shapes = {disk: tuple(self.weights[name].shape) for disk, name in names.items()}
        check_fits(adapter, self._adapter_config, shapes)
        self._put_weights({names[disk]: torch.from_numpy(tensor) for disk, tensor in adapter.tensors.items()})

    def _changed(self) -> Tensors:
        present = _copied(self.weights)
        return {name: tensor.numpy() for name, tensor in present.items() if not torch.equal(tensor, self._base[name])}

    def _put_changed(self, tensors: Tensors) -> None:
        known = {name: tuple(self._base[name].shape) for name in tensors if name in self._base}
        check_shapes(tensors, known)
        self._put_weights({**self._base, **{name: torch.from_numpy(tensor) for name, tensor in tensors.items()}})

    def _put_weights(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(weights[name])

    def _forget_optimizer(self) -> None:
        decayed = [p for p in self.weights.values() if p.ndim > 1]
        others = [p for p in self.weights.values() if p.ndim <= 1]  # norms and biases are not pulled to zero
        groups = [{"params": decayed, "decay": True}, {"params": others, "decay": False}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        self.steps = 0

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{name}|{key}": value
            for name, parameter in self.weights.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _put_moments(self, moments: Mapping[str, Tensor]) -> None:
        self._forget_optimizer()
        for full_name, value in moments.items():
            name, _, key = full_name.rpartition("|")
            parameter = self.weights[name]
            # AdamW keeps its step counter on the CPU
            place = torch.device("cpu") if key == "step" else parameter.device
            self.optimizer.state[parameter][key] = value.to(place, copy=True)


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    # renamed in transformers 5.23, which warns of the name that came before it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the reentrant kind loses gradients when the base is frozen


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

"""The model card of an adapter: README.md with YAML front matter as Hugging Face reads it, and facts only.

The same job gives the same bytes, since a job that is taken up again must publish the same artifact. So nothing in a
card depends on the clock or on how often the training was interrupted: seconds, steps and losses of the training itself
are in the round's record at the coordinator.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from pydantic import BaseModel

from fedmkt import __version__
from fedmkt.ml.models import LoadedModel
from fedmkt.ml.party import Party
from fedmkt.ml.phases import Distilled
from fedmkt.ml.quantization import quantized
from fedmkt.protocol import DistillJob, Evaluation, FederationConfig

FACTS_KEY = "fedmkt"
LIBRARIES = ("torch", "transformers", "peft", "safetensors")
LICENCE = """The base model's licence applies to this adapter as to everything that is derived from that model; so may
the licence of the public set. FedMKT does not know either. Whoever publishes this folder fills in the licence here and
in the front matter (`license`, `license_name`, `license_link`).

- Licence of the base model: *to be filled in by the operator*
- Licence of the public set: *to be filled in by the operator*
- Licence of this adapter: *to be filled in by the operator*
"""

_MERGED_USE = """
This folder is a whole model: the adapter that this card describes has been merged into its base, in {dtype}. What the
card says of quality was measured before that, on the base with the adapter beside it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
"""


class CardFacts(BaseModel):
    """What programs read in a card: `fedmkt` in the front matter, JSON on one line."""

    base_config: str | None  # SHA-256 of the base model's config.json; None where that file is no longer there
    base_vocabulary: str  # fingerprint
    federation: str
    round: int
    quantized: str | None = None  # 4bit or 8bit: how the base's linear layers were held while the adapter was trained


@dataclass(frozen=True)
class _Table:
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def __str__(self) -> str:
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def adapter_card(job: DistillJob, party: Party, distilled: Distilled, refused: Mapping[str, str]) -> str:
    """README.md of what `distilled` tried. `refused`: sites whose uploads were left out; the reasons are not told."""
    facts = CardFacts(
        base_config=config_digest(party),
        base_vocabulary=party.vocabulary.fingerprint,
        federation=job.federation_id,
        round=job.round_number,
        quantized=quantized(party.model),
    )
    name = f"{job.config.name}, round {job.round_number}"
    kind = "LoRA adapter" if job.config.lora else "set of retrained weights"
    sections = {
        "Base model": _base_model(party, facts),
        "Use": _use(job.config),
        "Data": _data(job, distilled, refused),
        "Held-out quality": _quality(distilled),
        "Lineage": _lineage(job, refused),
        "Configuration": _configuration(job.config),
        "Licence": LICENCE,
        "Software": _software(),
    }
    opening = (
        f"A {kind} for `{_code(party.card.model_id)}`, made by federated mutual knowledge transfer: the model learned "
        "on public texts from the token predictions of the sites' models. No private text, no site's weights went in."
    )
    body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections.items())
    return f"{_front_matter(party, job.config, facts)}\n# {name}\n\n{opening}\n\n{body}\n"


def merged_card(card: str, dtype: str) -> str:
    """The card of a whole model folder, from the card of the adapter that was merged into it."""
    told = card.replace('library_name: "peft"', 'library_name: "transformers"', 1)
    told = told.replace('base_model_relation: "adapter"', 'base_model_relation: "finetune"', 1)
    use = "\n## Use\n\n"
    before, found, after = told.partition(use)
    if not found:
        return told
    rest = after[after.find("\n## ") :]
    return f"{before}{use}{_MERGED_USE.format(dtype=dtype).strip()}\n{rest}"


def read_facts(card: str) -> CardFacts | None:
    """The facts of a card that `adapter_card` wrote; None in any other text."""
    for line in card.split("\n---", 1)[0].splitlines():
        if line.startswith(f"{FACTS_KEY}: "):
            return CardFacts.model_validate_json(line.removeprefix(f"{FACTS_KEY}: "))
    return None


def config_digest(loaded: Party | LoadedModel) -> str | None:
    """SHA-256 of the config.json that the model was loaded from, as `sha256sum` gives it; None where it has gone."""
    name, (_, _, revision) = loaded.model.config.name_or_path, loaded.card.model_id.partition("@")
    assert name  # from_pretrained sets it
    if Path(name).is_dir():
        found = [Path(name)]
    else:  # of a hub model the cache has one folder a commit
        repository = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
        found = list((repository / "snapshots").glob(f"{revision}*"))
    files = [folder / "config.json" for folder in found if (folder / "config.json").is_file()]
    return hashlib.sha256(files[0].read_bytes()).hexdigest() if len(files) == 1 else None


# ------------------------------------------------------------------------------------------------ front matter


def _front_matter(party: Party, config: FederationConfig, facts: CardFacts) -> str:
    """JSON values, which YAML reads: whatever a name holds, it stays one value."""
    base, _, revision = party.card.model_id.partition("@")
    values: dict[str, Any] = {
        "base_model": base,
        **({"base_model_revision": revision} if revision else {}),
        "base_model_relation": "adapter" if config.lora else "finetune",
        "library_name": "peft" if config.lora else "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "same-as-base-model",
        "license_link": "",
        "tags": ["fedmkt", "federated-learning", "knowledge-distillation", *(["lora"] if config.lora else [])],
        "metrics": ["accuracy", "bits_per_byte"],
        FACTS_KEY: facts.model_dump(),
    }
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"]) + "\n"


# ------------------------------------------------------------------------------------------------ sections


def _base_model(party: Party, facts: CardFacts) -> str:
    card = party.card
    base, _, revision = card.model_id.partition("@")
    rows = [
        ("model", f"`{_code(base)}`"),
        ("revision", f"`{_code(revision)}`" if revision else "none: a local folder"),
        ("SHA-256 of its config.json", f"`{facts.base_config}`" if facts.base_config else "not found"),
        ("vocabulary fingerprint", f"`{facts.base_vocabulary}`"),
        ("architecture", f"`{_code(card.architecture)}`"),
        ("parameters", f"{card.parameters:,}"),
        ("parameters trained", f"{card.trainable_parameters:,}"),
        ("trained on", f"`{_code(card.device)}`"),
    ]
    return str(_Table(("", ""), rows))


def _use(config: FederationConfig) -> str:
    if config.lora is None:
        return (
            "`weights.safetensors` holds the weights that differ from the base model's. "
            "`fedmkt adapter export --merge` writes a whole model folder of them."
        )
    return """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE")  # the base model above
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

`fedmkt adapter export --merge` writes one whole model folder instead."""


def _data(job: DistillJob, distilled: Distilled, refused: Mapping[str, str]) -> str:
    selection, cut = distilled.selection, job.config.public_set
    rows = [
        ("public set, SHA-256", f"`{job.public_set}`"),
        ("slice", f"{job.slice_index + 1} of {cut.slices}"),
        ("share held out from all training", f"{cut.holdout_share:g}"),
        ("response rows learned from others", f"{selection.supervised_rows:,} of {selection.rows:,}"),
    ]
    taught = [
        (
            f"`{upload.site}`",
            f"`{upload.knowledge}`",
            str(selection.offered.get(upload.site, 0)),
            "left out" if upload.site in refused else str(selection.taught.get(upload.site, 0)),
        )
        for upload in job.uploads
    ]
    knowledge = _Table(("site", "knowledge, SHA-256", "samples offered", "samples taught"), taught)
    return f"{_Table(('', ''), rows)}\n\n{knowledge}"


def _quality(distilled: Distilled) -> str:
    """After: as measured on this very adapter, also where the gate then went back to the one before."""
    if not distilled.before:
        return "Not measured: the federation holds nothing out."
    gate = distilled.gate
    decision = "" if gate is None else f"\n\nGate: {gate.decision.replace('_', ' ')}."
    if gate is not None and gate.reason:
        decision += f" {_text(gate.reason)}"
    diverged = gate is not None and gate.decision == "rolled_back" and distilled.after == distilled.before
    rows = [
        _quality_row(name, distilled.before[name], None if diverged else distilled.after[name])
        for name in sorted(distilled.before)
    ]
    head = ("domain", "samples", "bits per byte before", "after", "next-token accuracy before", "after")
    return (
        "On the public samples that nobody trains on. Bits per byte: negative log-likelihood of the responses, in "
        f"bits, over their UTF-8 bytes.\n\n{_Table(head, rows)}{_questions(distilled, diverged=diverged)}{decision}"
    )


def _quality_row(name: str, before: Evaluation, after: Evaluation | None) -> tuple[str, ...]:
    bits, accuracy = ("not finite",) * 2 if after is None else (f"{after.bits_per_byte:.6f}", f"{after.accuracy:.4f}")
    return (_text(name), str(before.samples), f"{before.bits_per_byte:.6f}", bits, f"{before.accuracy:.4f}", accuracy)


def _questions(distilled: Distilled, *, diverged: bool) -> str:
    """Questions with choices and free answers, where the held-out part has any."""
    rows: list[tuple[str, ...]] = []
    for name, before in sorted(distilled.before.items()):
        after = None if diverged else distilled.after[name]
        for what, count, was, now in (
            ("likeliest choice", before.choice_samples, before.choice_accuracy, after and after.choice_accuracy),
            ("Rouge-L of free answers", before.rouge_samples, before.rouge_l, after and after.rouge_l),
        ):
            if was is not None:
                now_text = "not finite" if now is None else f"{now:.4f}"
                rows.append((_text(name), what, str(count), f"{was:.4f}", now_text))
    return f"\n\n{_Table(('domain', 'questions', 'how many', 'before', 'after'), rows)}" if rows else ""


def _lineage(job: DistillJob, refused: Mapping[str, str]) -> str:
    parent = f"the adapter with SHA-256 `{job.adapter}`" if job.adapter else "version 0, the bare base model"
    rows = [
        ("federation", f"`{job.federation_id}` ({job.config.name}, {job.config.scenario})"),
        ("round", f"{job.round_number} (`{job.round_id}`)"),
        ("parent", parent),
        ("sites", f"{len(job.uploads) - len(refused)} of {len(job.uploads)} uploads used"),
    ]
    return str(_Table(("", ""), rows))


def _configuration(config: FederationConfig) -> str:
    chosen = config.model_dump(
        mode="json",
        include={"seed", "lora", "distillation", "llm_optimizer", "knowledge", "public_set", "gate"},
    )
    return f"```json\n{json.dumps(chosen, indent=2, sort_keys=True)}\n```"


def _software() -> str:
    rows = [("fedmkt", __version__), *((name, version(name)) for name in LIBRARIES)]
    return str(_Table(("library", "version"), rows))


def _text(text: str) -> str:
    """In a table or a line: no markup, no line breaks."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#!" else letter for letter in plain)


def _code(text: str) -> str:
    return "".join("'" if letter in "`|" or not letter.isprintable() else letter for letter in text)

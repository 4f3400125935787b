"""Where every arm of a seed starts: pre-trained models, and sites after their first private training. Made once, kept.

A folder is named by everything that decides what is in it, so arms and experiments share what they have in common.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from experiments.arms import ARMS
from experiments.setting import Setting
from experiments.texts import Pool, Texts, draw
from fedmkt.demo.models import FORMAT, ModelRecipe, make_model
from fedmkt.demo.workers import Progress
from fedmkt.ml.models import LoadedModel, configure_torch, load_base
from fedmkt.ml.party import Party
from fedmkt.ml.phases import private_phase


@dataclass(frozen=True)
class Start:
    """One party of one seed: its recipe, what it is pre-trained on, and the folder of the finished model."""

    name: str
    domain: str | None  # in which a site works
    recipe: ModelRecipe
    texts: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Seed:
    """One seed of an experiment before any arm is played."""

    setting: Setting
    number: int
    texts: Texts
    llm: Start
    sites: tuple[Start, ...]
    cache: Path

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)

    @classmethod
    def of(cls, setting: Setting, pool: Pool, number: int, cache: Path) -> "Seed":
        texts = draw(setting, pool, number)
        domains = tuple(texts.private)
        recipe = setting.llm.recipe("llm", domains, number)
        llm = _start("llm", None, recipe, texts, cache)
        sites = []
        for index, domain in enumerate(domains[: setting.sites]):
            equal = setting.scenario == "homogeneous"  # one base for all of them, which their adapters share
            recipe = setting.model_of(index).recipe("site", domains if equal else (domain,), number)
            sites.append(_start(domain, domain, recipe, texts, cache))
        return cls(setting, number, texts, llm, tuple(sites), cache)

    def models(self) -> dict[str, Start]:
        """Models that are not there yet, by folder name; equal ones once."""
        return {one.folder.name: one for one in (self.llm, *self.sites) if not one.folder.is_dir()}

    def load(self, start: Start) -> Party:
        return Party(self._base(start), self.setting.federation.lora, seed=self.number)

    def trained(self, site: Start) -> Party:
        """The site after its first private training, which is the same in every arm that has one."""
        folder = self.trained_folder(site)
        if folder.is_dir():
            return Party.load(folder, self._base(site))
        party, config = self.load(site), self.setting.config(ARMS["fedmkt"], self.names, self.number)
        private_phase(party, self.texts.private[site.name].train, config, epochs=config.private.first_epochs)
        draft = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
        party.save(draft)
        if folder.is_dir():  # another process was quicker
            shutil.rmtree(draft)
        else:
            draft.rename(folder)
        return party

    def trained_folder(self, site: Start) -> Path:
        federation = self.setting.federation
        content = [
            site.folder.name,
            self.number,
            [sample.text for sample in self.texts.private[site.name].train],
            federation.private.first_epochs,
            federation.site_optimizer.model_dump(),
            federation.lora.model_dump() if federation.lora else None,
            federation.knowledge.max_tokens,
        ]
        return self.cache / f"start-{_digest(content)}"

    def _base(self, start: Start) -> LoadedModel:
        configure_torch(1)
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own gap; it would draw over our lines
        return load_base(start.folder, device="cpu")


def make_start(progress: Progress, start: Start) -> None:
    """Pre-train one model, in a process of its own."""
    start.folder.parent.mkdir(parents=True, exist_ok=True)
    make_model(progress, start.recipe, start.texts, start.folder)


def _start(name: str, domain: str | None, recipe: ModelRecipe, texts: Texts, cache: Path) -> Start:
    seen = texts.seen(recipe.domains, recipe.domain_chunks)
    folder = cache / f"model-{_digest([FORMAT, asdict(recipe), seen])}"
    return Start(name, domain, recipe, seen, folder)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

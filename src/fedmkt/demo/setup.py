"""What the demo federates: models, texts and configuration, its own or the user's."""

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedmkt.demo.models import SITE_DOMAIN_CHUNKS, default_recipes, ensure_models
from fedmkt.demo.texts import DOMAINS, GENERAL, Corpus, build_corpus, private_jsonl, public_jsonl
from fedmkt.demo.workers import Report
from fedmkt.errors import Refusal
from fedmkt.protocol import (
    DistillationConfig,
    FederationConfig,
    LoraConfig,
    OptimizerConfig,
    PrivateConfig,
    PublicSetConfig,
    Schedule,
)

PRIVATE_CHUNKS = 700
SLICE_CHUNKS = 26  # of each domain, in each round's slice
HOLDOUT_CHUNKS = 40  # of each domain
PUBLIC_CHUNKS = 216  # of each domain, at most; more rounds share them in smaller slices
PRETRAINING_CHUNKS = SITE_DOMAIN_CHUNKS
HOLDOUT_SHARE = 0.1  # of a user's own public set
TIMEOUT_S = 600.0  # of each state of a round
OWN_RATE = 1e-3  # LoRA, for models that the user brings
TEXT_FORMAT = 1  # grows when the same packages would give other chunks


class SiteIncomplete(Refusal):
    code = "demo.site_incomplete"
    title = "A site of the demo lacks a model or a text"


@dataclass(frozen=True)
class DemoOptions:
    rounds: int = 3
    llm: str | None = None
    slms: Mapping[str, str] = field(default_factory=dict)
    public: Path | None = None
    private: Mapping[str, Path] = field(default_factory=dict)
    out: Path = Path("runs/demo")
    cache: Path = Path("runs/cache")
    controls: bool = True


@dataclass(frozen=True)
class ModelSource:
    """A folder, or a hub id with its commit."""

    source: str
    revision: str | None = None

    @classmethod
    def parse(cls, given: str) -> "ModelSource":
        if Path(given).is_dir():
            return cls(str(Path(given).resolve()))
        source, _, revision = given.partition("@")
        return cls(source, revision or None)


@dataclass(frozen=True)
class SiteSetup:
    name: str
    model: ModelSource
    private_file: Path
    domain: str | None  # which of the public set's domains its private text is of, where that is known


@dataclass(frozen=True)
class Setup:
    """A federation ready to run. All files exist."""

    config: FederationConfig
    llm: ModelSource
    sites: tuple[SiteSetup, ...]
    public_file: Path
    rounds: int


def prepare(options: DemoOptions, on_progress: Report) -> Setup:
    """Collect or build what the options leave out, from the cache where it has been before. Raises SiteIncomplete."""
    corpus = None if _nothing_missing(options) else cached_corpus(options.cache, on_progress)
    own = tuple(corpus.private) if corpus is not None else ()
    names = _site_names(options, own)
    folder = options.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    models = _models(options, names, corpus, on_progress)
    sites = tuple(
        SiteSetup(name, models[name], _private_file(name, options, corpus, folder), name if name in own else None)
        for name in names
    )
    public_file, public_config = _public_set(options, corpus, folder)
    config = demo_config(names, public_config, own_models=options.llm is not None or bool(options.slms))
    return Setup(config, models["llm"], sites, public_file, options.rounds)


def cached_corpus(cache: Path, on_progress: Report) -> Corpus:
    """The texts of this installation; read from the packages once for each set of versions."""
    path = cache / f"texts-{_text_key()}.json"
    if path.exists():
        return Corpus.from_json(path.read_bytes())
    on_progress("reading the installed documentation", 0, 1)
    corpus = build_corpus(private=PRIVATE_CHUNKS, public=PUBLIC_CHUNKS, pretraining=PRETRAINING_CHUNKS)
    cache.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_bytes(corpus.to_json())
    draft.replace(path)
    on_progress("reading the installed documentation", 1, 1)
    return corpus


def _text_key() -> str:
    """Changes with whatever changes the texts: sources, their versions, how they are cut."""
    versions = {}
    for source in (*DOMAINS, *GENERAL):
        if source.root == "purelib":
            try:
                versions[source.path] = importlib.metadata.version(source.path)
            except importlib.metadata.PackageNotFoundError:
                versions[source.path] = ""
    sizes = [TEXT_FORMAT, PRIVATE_CHUNKS, PUBLIC_CHUNKS, PRETRAINING_CHUNKS, sys.version_info[:3]]
    parts = [sizes, versions, [asdict(source) for source in (*DOMAINS, *GENERAL)]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ who takes part


def _nothing_missing(options: DemoOptions) -> bool:
    everything = options.llm is not None and options.public is not None and bool(options.slms)
    return everything and set(options.slms) == set(options.private)


def _site_names(options: DemoOptions, own: tuple[str, ...]) -> tuple[str, ...]:
    """The demo's sites, unless a site of the user's own is named: then exactly those that are named."""
    named = tuple(dict.fromkeys([*options.slms, *options.private]))
    if named and all(name in own for name in named):
        return own
    for name in named:
        missing = "--slm" if name not in options.slms else "--private" if name not in options.private else None
        if missing is not None and name not in own:
            raise SiteIncomplete(
                f"site {name!r} has no {missing}; give {missing} {name}=PATH, or name the demo's own sites: "
                f"{', '.join(own)}"
            )
    return named or own


def _models(
    options: DemoOptions, names: tuple[str, ...], corpus: Corpus | None, on_progress: Report
) -> dict[str, ModelSource]:
    given = {name: ModelSource.parse(path) for name, path in options.slms.items()}
    if options.llm is not None:
        given["llm"] = ModelSource.parse(options.llm)
    wanted = [name for name in ("llm", *names) if name not in given]
    if not wanted:
        return given
    assert corpus is not None
    made = ensure_models(
        default_recipes(list(corpus.private)), corpus, options.cache, wanted=wanted, on_progress=on_progress
    )
    return given | {name: ModelSource(str(folder.resolve())) for name, folder in made.items()}


# ------------------------------------------------------------------------------------------------ what they hold


def _private_file(name: str, options: DemoOptions, corpus: Corpus | None, folder: Path) -> Path:
    if name in options.private:
        return options.private[name].resolve()
    assert corpus is not None
    path = folder / f"private-{name}.jsonl"
    path.write_bytes(private_jsonl(corpus.private[name]))
    return path.resolve()


def _public_set(options: DemoOptions, corpus: Corpus | None, folder: Path) -> tuple[Path, PublicSetConfig]:
    if options.public is not None:
        return options.public.resolve(), PublicSetConfig(slices=options.rounds, holdout_share=HOLDOUT_SHARE)
    assert corpus is not None
    chunks = min(HOLDOUT_CHUNKS + SLICE_CHUNKS * options.rounds, PUBLIC_CHUNKS)
    path = folder / "public.jsonl"
    path.write_bytes(public_jsonl({domain: texts[:chunks] for domain, texts in corpus.public.items()}))
    return path.resolve(), PublicSetConfig(slices=options.rounds, holdout_share=HOLDOUT_CHUNKS / chunks)


def demo_config(names: tuple[str, ...], public: PublicSetConfig, *, own_models: bool = False) -> FederationConfig:
    """Settings at which the demo's small models show an effect in minutes; gentler ones for models that users bring."""
    llm_rate, site_rate = (OWN_RATE, OWN_RATE) if own_models else (1e-3, 2e-3)
    return FederationConfig(
        name="demo",
        sites=names,
        public_set=public,
        # Every site has to be there: the demo starts again what dies, and no round shall pass without it.
        schedule=Schedule(
            quorum=len(names), collect_timeout_s=TIMEOUT_S, distill_timeout_s=TIMEOUT_S, apply_timeout_s=TIMEOUT_S
        ),
        distillation=DistillationConfig(epochs=2),
        private=PrivateConfig(first_epochs=2.0, epochs=0.25),
        lora=LoraConfig() if own_models else None,  # LoRA leaves embeddings alone, which such small models live by
        llm_optimizer=OptimizerConfig(learning_rate=llm_rate),
        site_optimizer=OptimizerConfig(learning_rate=site_rate),
    )

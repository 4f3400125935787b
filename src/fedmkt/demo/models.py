"""The demo's models: small, of different architectures and tokenizers, pre-trained in minutes and kept as HF folders.

Each is built from a configuration, trained from scratch on documentation text and saved with `save_pretrained`, so the
services load it through the same code as any real model.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from fedmkt.demo.texts import Corpus
from fedmkt.demo.vocabularies import TokenizerKind, as_transformers, train_tokenizer
from fedmkt.demo.workers import Call, Progress, Report, run_calls

FORMAT = 1  # grows when the same recipe would give other models
POSITIONS = 1024
WARMUP_STEPS = 20
FLAT_SHARE = 0.4  # of the steps at the full rate; then it falls in a straight line to zero
LLM_DOMAIN_CHUNKS = 100  # it knows a little of everything, and less of each domain than the site that works there
SITE_DOMAIN_CHUNKS = 300
TOKENIZER_CHUNKS = 3000  # of general text; more changes little and costs seconds

Settings = dict[str, int | float | bool]


@dataclass(frozen=True)
class ModelRecipe:
    """Everything that decides a model's weights, next to the corpus. Two recipes are equal iff the models are."""

    name: str
    architecture: str  # a transformers model_type
    settings: Settings
    tokenizer: TokenizerKind
    vocabulary: int
    steps: int
    domains: tuple[str, ...]  # whose pre-training parts it sees beside the general text
    domain_chunks: int  # of each of them
    batch_size: int = 16
    adamw_rate: float = 5e-3  # embeddings, norms and biases
    muon_rate: float = 1e-2  # matrices
    seed: int = 0


@dataclass(frozen=True)
class Recipes:
    """The LLM and one SLM for each site."""

    llm: ModelRecipe
    sites: dict[str, ModelRecipe] = field(default_factory=dict)

    def digest(self, corpus: Corpus) -> str:
        recipe = json.dumps([FORMAT, asdict(self), corpus.digest], sort_keys=True)
        return hashlib.sha256(recipe.encode()).hexdigest()[:16]


SMALL: Settings = {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 4}
SITE_KINDS: tuple[tuple[str, Settings, TokenizerKind, int], ...] = (
    ("qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 256}, "byte_bpe_digits", 1200),
    ("llama", SMALL | {"num_key_value_heads": 4, "intermediate_size": 256}, "unigram", 1500),
    ("gpt_neox", SMALL | {"intermediate_size": 384, "rotary_pct": 1.0}, "byte_bpe", 1000),
    ("bloom", {"n_layer": 2, "hidden_size": 96, "n_head": 4}, "sentencepiece_bpe", 1300),
)


def default_recipes(domains: Sequence[str], *, llm_steps: int = 350, site_steps: int = 200) -> Recipes:
    """One site for each domain, of the four kinds in turn; the LLM has seen a little of every domain."""
    llm = ModelRecipe(
        name="llm",
        architecture="llama",
        settings={
            "num_hidden_layers": 3,
            "hidden_size": 160,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "intermediate_size": 448,
        },
        tokenizer="byte_bpe",
        vocabulary=2000,
        steps=llm_steps,
        domains=tuple(domains),
        domain_chunks=LLM_DOMAIN_CHUNKS,
    )
    sites = {}
    for number, domain in enumerate(domains):
        architecture, settings, tokenizer, size = SITE_KINDS[number % len(SITE_KINDS)]
        sites[domain] = ModelRecipe(
            domain, architecture, settings, tokenizer, size, site_steps, (domain,), SITE_DOMAIN_CHUNKS
        )
    return Recipes(llm, sites)


# ------------------------------------------------------------------------------------------------ the cache


def ensure_models(
    recipes: Recipes,
    corpus: Corpus,
    cache: Path,
    *,
    wanted: Collection[str] | None = None,
    workers: int = 2,
    on_progress: Report = lambda name, done, total: None,
) -> dict[str, Path]:
    """Folders of the wanted models (None: all) by name, trained now where the cache lacks them.

    The LLM comes first, being the longest.
    """
    folder = cache / f"models-{recipes.digest(corpus)}"
    found = [recipe for recipe in (recipes.llm, *recipes.sites.values()) if wanted is None or recipe.name in wanted]
    calls = {
        recipe.name: Call(
            make_model, {"recipe": recipe, "texts": _texts(recipe, corpus), "folder": folder / recipe.name}
        )
        for recipe in found
        if not (folder / recipe.name).is_dir()
    }
    if calls:
        folder.mkdir(parents=True, exist_ok=True)
        run_calls(calls, workers=workers, on_progress=on_progress)
    return {recipe.name: folder / recipe.name for recipe in found}


def make_model(progress: Progress, recipe: ModelRecipe, texts: Sequence[str], folder: Path) -> None:
    """Train one tokenizer and one model, and put the finished folder in its place in one step."""
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own gap; saving takes a moment
    tokenizer = train_tokenizer(recipe.tokenizer, recipe.vocabulary, _tokenizer_texts(texts))
    model = build_model(recipe, tokenizer.get_vocab_size())
    pretrain(progress, model, [[0, *e.ids] for e in tokenizer.encode_batch(texts)], recipe)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    as_transformers(tokenizer).save_pretrained(draft)
    if folder.is_dir():  # another demo was quicker
        shutil.rmtree(draft)
    else:
        draft.rename(folder)


def _texts(recipe: ModelRecipe, corpus: Corpus) -> tuple[str, ...]:
    """Domain text last, so that the tokenizer's share can be cut from either end."""
    chunks = recipe.domain_chunks
    return corpus.general + tuple(text for domain in recipe.domains for text in corpus.pretraining[domain][:chunks])


def _tokenizer_texts(texts: Sequence[str]) -> Sequence[str]:
    return [*texts[:TOKENIZER_CHUNKS], *texts[-TOKENIZER_CHUNKS // 2 :]]


# ------------------------------------------------------------------------------------------------ training


def build_model(recipe: ModelRecipe, vocabulary_size: int) -> PreTrainedModel:
    """Random weights from the recipe's seed, input and output embeddings tied."""
    config = AutoConfig.for_model(
        recipe.architecture,
        vocab_size=vocabulary_size,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        **recipe.settings,
    )
    torch.manual_seed(recipe.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers' own gap
    return model


def pretrain(progress: Progress, model: PreTrainedModel, sequences: Sequence[list[int]], recipe: ModelRecipe) -> None:
    """Next-token training, mean over the tokens of a batch. Muon for the matrices: a third of AdamW's steps here."""
    optimizers = _optimizers(model, recipe)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    model.train()
    for step, batch in enumerate(_batches(sequences, recipe)):
        factor = _rate_factor(step, recipe.steps)
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
        torch.autograd.backward(_loss(model, batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress(step + 1, recipe.steps)


def _optimizers(model: PreTrainedModel, recipe: ModelRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and any(map(str.isdigit, name.split(".")))]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.AdamW(rest, lr=recipe.adamw_rate, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=recipe.muon_rate, momentum=0.95, weight_decay=0.01),
    ]


def _rate_factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (steps * (1 - FLAT_SHARE)))


def _batches(sequences: Sequence[list[int]], recipe: ModelRecipe) -> Iterable[Sequence[list[int]]]:
    """`steps` batches; every sequence once before any comes again."""
    order = random.Random(recipe.seed)  # noqa: S311 - an order of training, not a secret
    pool: list[list[int]] = []
    for _ in range(recipe.steps):
        if len(pool) < recipe.batch_size:
            pool = order.sample(sequences, len(sequences))
        batch, pool = pool[: recipe.batch_size], pool[recipe.batch_size :]
        yield batch


def _loss(model: PreTrainedModel, batch: Sequence[list[int]]) -> Tensor:
    """Mean cross-entropy in nats per token. Padding on the right needs no mask: attention is causal."""
    longest = max(map(len, batch))
    padded = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in batch])  # (B, T)
    logits = model(input_ids=padded.clamp(min=0)).logits[:, :-1]  # (B, T-1, V)
    return F.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), ignore_index=-100)

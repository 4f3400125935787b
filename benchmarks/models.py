"""Models to measure: the demo's own LLM, and randomly initialised ones of a stated shape."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.data import REPOSITORY
from fedmkt.demo.models import Recipes, default_recipes, ensure_models
from fedmkt.demo.texts import Corpus, build_corpus
from fedmkt.ml.models import LoadedModel, parameter_count
from fedmkt.ml.party import Party
from fedmkt.protocol import LoraConfig, ModelCard
from fedmkt.vocabulary import Vocabulary

CACHE = REPOSITORY / "build" / "benchmarks"
SITE_STEPS = 40  # of training: what a pass costs does not depend on it


@dataclass(frozen=True)
class DemoModel:
    """The folder of a trained model of the demo, and the public text of the demo's federation."""

    folder: Path
    texts: tuple[str, ...]


@functools.cache
def demo_corpus() -> Corpus:
    return build_corpus()


@functools.cache
def demo_llm() -> DemoModel:
    """Pre-trained as `make demo` does it, in about two minutes, and kept below build/."""
    corpus = demo_corpus()
    llm = default_recipes(tuple(corpus.public)).llm
    folder = ensure_models(Recipes(llm), corpus, CACHE, workers=1)[llm.name]
    return DemoModel(folder, tuple(text for chunks in corpus.public.values() for text in chunks))


@functools.cache
def demo_sites() -> dict[str, Path]:
    """Folders of the demo's site models by domain, less trained than there, kept below build/."""
    recipes = default_recipes(tuple(demo_corpus().public), site_steps=SITE_STEPS)
    return ensure_models(recipes, demo_corpus(), CACHE, wanted=list(recipes.sites), workers=1)


@dataclass(frozen=True)
class Shape:
    """A Llama. The head is tied, as in the small models of that family."""

    name: str
    width: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    positions: int = 2048


WIDE = Shape("4 layers, d 1,024", 1024, 4, 16, 8, 2816)
ONE_BILLION = Shape("Llama of 1.2e9 parameters", 2048, 16, 32, 8, 8192)
TINY = Shape("tiny Llama", 64, 2, 4, 2, 128)


def random_party(
    shape: Shape, vocabulary: Vocabulary, *, device: str = "cpu", dtype: torch.dtype = torch.float32, lora: bool = False
) -> Party:
    """A party around a randomly initialised model for a vocabulary."""
    loaded = random_base(shape, vocabulary, device=device, dtype=dtype)
    return Party(loaded, LoraConfig() if lora else None, seed=0)


def random_base(shape: Shape, vocabulary: Vocabulary, *, device: str, dtype: torch.dtype) -> LoadedModel:
    """A randomly initialised model for a vocabulary, as `load_base` gives one."""
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=vocabulary.bos_id,
        eos_token_id=vocabulary.eos_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    nn.Module.to(model, dtype)
    model.train(False)
    card = ModelCard(
        model_id=shape.name,
        architecture=type(model).__name__,
        parameters=parameter_count(model),
        trainable_parameters=0,
        device=device,
    )
    content = json.dumps(json.loads(vocabulary.to_bytes())["tokenizer"])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers' own gap
        tokenizer_object=Tokenizer.from_str(content)
    )
    return LoadedModel(model, tokenizer, vocabulary, card)

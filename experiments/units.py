"""Units of work (an arm of a seed), one process a core. What is finished is a file and is never done again."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from experiments.arms import ARMS
from experiments.lines import Line, read_lines, write_lines
from experiments.play import play
from experiments.setting import Setting
from experiments.starts import Seed, make_start
from experiments.texts import Pool, demo_pool, real_pool
from fedmkt.demo.workers import Call, Progress, Report, run_calls

ATTEMPTS = 3  # of a run whose worker processes are killed


@dataclass(frozen=True)
class Folders:
    """results: lines by experiment; cache: models and starts, which experiments share; texts: the demo's."""

    results: Path = Path("runs/experiments/results")
    cache: Path = Path("runs/experiments/cache")
    texts: Path = Path("runs/cache")

    def of(self, setting: Setting) -> Path:
        return self.results / f"{setting.name}-{setting.digest}"


@dataclass(frozen=True)
class Unit:
    setting: Setting
    arm: str
    seed: int

    def file(self, folders: Folders) -> Path:
        return folders.of(self.setting) / f"{self.arm}-{ARMS[self.arm].digest}.{self.seed}.jsonl"


def units_of(settings: Sequence[Setting]) -> list[Unit]:
    """Seed by seed, so that a run which is stopped has whole pairs."""
    seeds = sorted({seed for setting in settings for seed in setting.seeds})
    return [
        Unit(setting, arm, seed)
        for seed in seeds
        for setting in settings
        if seed in setting.seeds
        for arm in setting.arms
    ]


def finished_lines(setting: Setting, folders: Folders) -> list[Line]:
    """Of all units that are done."""
    files = (unit.file(folders) for unit in units_of([setting]))
    return [line for file in files if file.is_file() for line in read_lines(file)]


def run(settings: Sequence[Setting], folders: Folders, *, workers: int, tell: Report, pool: Pool | None = None) -> None:
    """Everything that is missing: models first, then the sites' first training, then the arms.

    A worker that is killed (out of memory, by hand) is started again with what is left, ATTEMPTS times in all.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            for calls in _stages(settings, folders, pool):
                if calls:
                    run_calls(calls, workers=workers, on_progress=tell)
        except BrokenProcessPool:
            if attempt == ATTEMPTS:
                raise
        else:
            return


def _stages(settings: Sequence[Setting], folders: Folders, pool: Pool | None) -> Iterable[dict[str, Call]]:
    """Made one after the other: what a stage lacks depends on the one before."""
    missing = [unit for unit in units_of(settings) if not unit.file(folders).is_file()]
    seeds = {(unit.setting.digest, unit.seed): unit for unit in missing}
    found = [_seed(unit, folders, pool) for unit in seeds.values()] if missing else []
    models = {name: start for seed in found for name, start in seed.models().items()}
    yield {
        f"pre-training of {one.name}, seed {one.recipe.seed}, {key}": Call(make_start, {"start": one})
        for key, one in models.items()
    }
    starts = {
        seed.trained_folder(site): (
            f"first training of {site.name}, seed {seed.number}",
            {"unit": unit, "folders": folders, "pool": pool, "site": index},
        )
        for seed, unit in zip(found, seeds.values(), strict=True)
        for index, site in enumerate(seed.sites)
    }
    yield {
        f"{name}, {folder.name}": Call(_train_first, arguments)
        for folder, (name, arguments) in starts.items()
        if not folder.is_dir()
    }
    yield {
        f"{unit.setting.name} {unit.arm}, seed {unit.seed}": Call(
            _play, {"unit": unit, "folders": folders, "pool": pool}
        )
        for unit in missing
    }


def _seed(unit: Unit, folders: Folders, pool: Pool | None) -> Seed:
    if pool is None:
        pool = real_pool() if unit.setting.texts.source == "real" else demo_pool(folders.texts)
    return Seed.of(unit.setting, pool, unit.seed, folders.cache)


def _train_first(progress: Progress, unit: Unit, folders: Folders, pool: Pool | None, site: int) -> None:
    seed = _seed(unit, folders, pool)
    seed.trained(seed.sites[site])
    progress(1, 1)


def _play(progress: Progress, unit: Unit, folders: Folders, pool: Pool | None) -> None:
    lines = play(_seed(unit, folders, pool), unit.arm, ARMS[unit.arm], progress)
    write_lines(unit.file(folders), lines)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

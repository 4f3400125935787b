"""Coverage-guided fuzzing of everything that reads another party's bytes: `make fuzz`, or

    python -m fuzz.run --seconds 600 --target knowledge

Each target runs in a process of its own under atheris (libFuzzer), from valid inputs and from what earlier runs kept in
runs/fuzz. A finding (exception, hang of 10 s, memory over the target's bound) ends the target, is kept beside the
corpus, and makes the exit status 1; give the file it names to the target's `run` to see it again.
"""

import argparse
import hashlib
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HANG_S = 10
ODDS = {"knowledge": 1.0, "vocab_map": 0.2, "vocabulary": 0.2, "public_set": 0.2}  # of the seconds, for each target
MOST_BYTES = 1 << 20


def fuzz(name: str, folder: Path, seconds: int) -> None:
    """Never returns: libFuzzer ends the process. Status 0 when nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["fedmkt"]):
        from fedmkt import cutting_speed
        from fuzz.targets import TARGETS

    target = TARGETS[name]
    cutting_speed.LENGTHS = (64,)  # at full length every vocabulary would take a tenth of a second
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        target.run(seed)  # so that nothing is imported late, under the bound
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        changed = target.mutate(data, random.Random(seed), lambda piece, most: atheris.Mutate(piece, most))
        return changed[:size]

    def run(data: bytes) -> None:
        with _bounded_memory(target.memory_mib):
            target.run(data)

    options = [
        *(f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-max_len={MOST_BYTES}", "-print_final_stats=1"),
        f"-artifact_prefix={folder}/finding-",
        "-rss_limit_mb=0",  # libFuzzer's own tables grow; what one input takes is bounded in `run`
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], run, custom_mutator=mutate)
    atheris.Fuzz()


@contextmanager
def _bounded_memory(mib: int) -> Iterator[None]:
    """Address space beyond what the process has now is refused inside: a larger allocation raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    limit = pages * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="for knowledge; the other targets take a fifth each")
    parser.add_argument("--target", choices=ODDS, action="append", help="all of them when none is named")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "fuzz", help="corpus, logs and findings")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process: what main starts
    options = parser.parse_args()
    names = options.target or list(ODDS)
    if options.here:
        fuzz(names[0], options.folder / names[0], options.seconds)
    return max(_watched(name, options.folder, max(1, round(options.seconds * ODDS[name]))) for name in names)


def _watched(name: str, folder: Path, seconds: int) -> int:
    """Run one target in a process of its own and print its last words; 0 when nothing was found."""
    command = [sys.executable, "-m", "fuzz.run", "--here", "--target", name, "--seconds", str(seconds)]
    (folder / name).mkdir(parents=True, exist_ok=True)
    log = folder / name / "log.txt"
    began = time.monotonic()
    with log.open("wb") as output:
        ran = subprocess.run(
            [*command, "--folder", str(folder)], cwd=REPOSITORY / "tests", stdout=output, stderr=output, check=False
        )
    text = log.read_text(errors="replace")
    executed = re.search(r"number_of_executed_units: *(\d+)", text)
    peak = re.search(r"peak_rss_mb: *(\d+)", text)
    covered = re.findall(r"cov: (\d+)", text)
    print(
        f"fuzz: {name}: {executed[1] if executed else 'unknown'} inputs in {time.monotonic() - began:.0f} s, "
        f"{covered[-1] if covered else 'unknown'} edges covered, peak {peak[1] if peak else 'unknown'} MiB: "
        + ("nothing found" if ran.returncode == 0 else f"FINDING, see {log}"),
        flush=True,
    )
    return 0 if ran.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

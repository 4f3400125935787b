"""benchmarks/gpu.py runs, on a tiny model on the CPU: what only some machines can measure must not rot elsewhere."""

import torch

from benchmarks.gpu import run, table


def bench_the_gpu_script_runs() -> None:
    figures = run("tiny", torch.device("cpu"))
    assert [figure.what.partition(",")[0] for figure in figures] == ["bare forward pass", "extraction", *["step"] * 4]
    assert all(figure.seconds > 0 and figure.peak_mib is None for figure in figures)
    assert len(table(figures)) == 2 + len(figures)

"""benchmarks/gpu.py runs, on a tiny model on the CPU: what only some machines can measure must not rot elsewhere."""

import torch

from benchmarks.gpu import run, run_job, table
from benchmarks.gpu_job import job_table


def bench_the_gpu_script_runs() -> None:
    figures = run("tiny", torch.device("cpu"))
    assert [figure.what.partition(",")[0] for figure in figures] == ["bare forward pass", "extraction", *["step"] * 4]
    assert all(figure.seconds > 0 and figure.peak_mib is None for figure in figures)
    assert len(table(figures)) == 2 + len(figures)


def bench_the_whole_job_of_the_gpu_script_runs() -> None:
    job = run_job("tiny", torch.device("cpu"))
    assert job.tokens > 12 * 16
    assert 0 < job.train_seconds < job.job_seconds
    assert (job.peak_mib, job.busy) == (None, None)
    assert len(job_table(job)) == 5

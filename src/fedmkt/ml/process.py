"""What a process that owns a model sets once, at its start."""

from transformers.utils import logging as transformers_logging

from fedmkt.ml.models import configure_torch


def prepare_process(torch_threads: int) -> None:
    """`torch_threads` CPU threads (0: torch's own choice); transformers logs like everybody else, without bars."""
    if torch_threads > 0:
        configure_torch(torch_threads)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own gap
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()

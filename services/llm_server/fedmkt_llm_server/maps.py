"""The job that builds a vocabulary map: two vocabularies in, one artifact out."""

import logging
import time
from collections.abc import Callable

from fedmkt.protocol import MapJob, MapResult
from fedmkt.teachers import read_vocabulary
from fedmkt.vocab_map import build_vocab_map
from fedmkt.vocabulary_process import VocabularyProcess

log = logging.getLogger(__name__)


def build_map(
    job: MapJob,
    fetch: Callable[[str], bytes],
    publish: Callable[[bytes], str],
    report: Callable[[str, int, int], None],
) -> MapResult:
    """Build the map teacher -> student and publish it. `fetch` and `publish` go by SHA-256."""
    began = time.monotonic()
    report("reading vocabularies", 0, 0)
    with VocabularyProcess() as process:
        teacher = read_vocabulary(fetch(job.teacher_artifact), job.teacher, process.read)
        student = read_vocabulary(fetch(job.student_artifact), job.student, process.read)
        step = f"mapping {teacher.size} tokens to {student.size}"
        vocab_map = build_vocab_map(
            teacher, student, job.method, progress=lambda done, total: report(step, done, total)
        )
    report("publishing the map", 0, 0)
    artifact = publish(vocab_map.to_bytes())
    log.info(
        "map.built",
        extra={
            "method": job.method,
            "teacher_tokens": teacher.size,
            "student_tokens": student.size,
            "seconds": round(time.monotonic() - began, 3),
        },
    )
    return MapResult(artifact=artifact)

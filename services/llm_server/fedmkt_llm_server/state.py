"""The LLM server's folder on disk. Everything in it can be lost: it saves work, it holds no truth.

artifacts/<digest>    what was fetched: public sets, vocabularies, maps; uploads while their job runs
parties/<digest>/     the LLM with this adapter, and the optimizer that made it; the last few
jobs/<round id>/      of a job that may be tried again: the LLM's own knowledge, and at last the result
worker-name           under which this server takes jobs (`queue.lasting_name`)
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ValidationError

from fedmkt.knowledge import Knowledge
from fedmkt.knowledge_file import KnowledgeFileUnreadable, read_knowledge_file, write_knowledge_file
from fedmkt.ml.party import Party
from fedmkt.protocol import DistillJob, DistillResult

log = logging.getLogger(__name__)

KEPT_PARTIES = 4  # of all federations; one that has gone starts with a fresh optimizer
KEPT_JOBS = 4


class LlmState:
    def __init__(self, folder: Path) -> None:
        self.artifacts = folder / "artifacts"
        self._parties = folder / "parties"
        self._jobs = folder / "jobs"
        for each in (self.artifacts, self._parties, self._jobs):
            each.mkdir(parents=True, exist_ok=True)

    # -------------------------------------------------------------------------------------------- parties

    def save_party(self, adapter: str, party: Party) -> None:
        party.save(self._parties / adapter)
        _keep_newest(self._parties, KEPT_PARTIES)

    def party_folder(self, adapter: str) -> Path | None:
        folder = self._parties / adapter
        return folder if folder.is_dir() else None

    # -------------------------------------------------------------------------------------------- jobs

    def own_knowledge(self, round_id: str, model_id: str, make: Callable[[], Knowledge]) -> Knowledge:
        """The LLM's own knowledge of a round: made once by a model, so that a second attempt publishes the same."""
        path = self._jobs / round_id / "own.safetensors"
        if path.exists():
            try:
                found = read_knowledge_file(path)
            except KnowledgeFileUnreadable as error:
                log.warning("knowledge.file_unreadable", extra={"reason": error.detail})
            else:
                if found.header.model_id == model_id:
                    return found
        made = make()
        path.parent.mkdir(exist_ok=True)
        write_knowledge_file(path, made)
        _keep_newest(self._jobs, KEPT_JOBS)
        return made

    def checkpoint_file(self, round_id: str) -> Path:
        return self._jobs / round_id / "checkpoint.safetensors"

    def end_job(self, job: DistillJob, model_id: str, result: DistillResult, artifacts: list[str]) -> None:
        """The job is done: its files go, and the artifacts that were fetched for it alone.

        The result stays for a while: whether the coordinator gets it is not known yet.
        """
        shutil.rmtree(self._jobs / job.round_id, ignore_errors=True)
        kept = _KeptResult(job=job, model_id=model_id, result=result)
        path = self._result_file(job)
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".new")
        draft.write_text(kept.model_dump_json())
        draft.replace(path)
        _keep_newest(self._jobs, KEPT_JOBS)
        for digest in artifacts:
            (self.artifacts / digest).unlink(missing_ok=True)

    def ended_job(self, job: DistillJob, model_id: str) -> DistillResult | None:
        """The result of an earlier attempt at this very job by this model, whose answer to the coordinator was lost."""
        path = self._result_file(job)
        if not path.exists():
            return None
        try:
            kept = _KeptResult.model_validate_json(path.read_bytes())
        except ValidationError as error:
            log.warning("result.file_unreadable", extra={"reason": f"{error.error_count()} fields differ"})
            return None
        return kept.result if (kept.job, kept.model_id) == (job, model_id) else None

    def _result_file(self, job: DistillJob) -> Path:
        return self._jobs / job.round_id / "result.json"


class _KeptResult(BaseModel):
    job: DistillJob
    model_id: str
    result: DistillResult


def _keep_newest(folder: Path, count: int) -> None:
    by_age = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in by_age[count:]:
        shutil.rmtree(path, ignore_errors=True)

"""A site and an LLM server without models: the product's own client, worker, queue and lease around made-up numbers.

What they send is decided by site and round alone, so that a test can say of every receipt which bytes it stands for.
"""

import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from coordinator_world import CARD, a_report, make_knowledge
from fedmkt import fault_points
from fedmkt.client import CoordinatorClient, RetryPolicy, SiteKey, StaticToken
from fedmkt.errors import Refusal
from fedmkt.knowledge import encode
from fedmkt.logs import configure_logs
from fedmkt.protocol import (
    CHUNK_BYTES,
    Apply,
    DistillJob,
    DistillResult,
    Evaluation,
    FederationConfig,
    GateReport,
    JobView,
    MapResult,
    SelectionReport,
    SiteModel,
    TrainAndUpload,
    UploadReceipt,
)
from fedmkt.public_set import PublicSet
from fedmkt.signing import UploadKind, load_key, new_key, save_key
from fedmkt.stopping import StopFlag
from fedmkt_llm_server.queue import lasting_name
from fedmkt_llm_server.registration import Registrar
from fedmkt_llm_server.worker import Report, Worker
from small_tokenizers import vocabulary

log = logging.getLogger(__name__)

PATIENT = RetryPolicy(first_wait_s=0.02, max_wait_s=0.2, patience_s=300)
QUICK = RetryPolicy(first_wait_s=0.02, max_wait_s=0.2, patience_s=1)
WORDS = "byte_level"  # everybody's vocabulary: adapters are averaged in homogeneous federations only
ADAPTER_BYTES = CHUNK_BYTES + 1000  # two chunks
STEPS = 4


# ------------------------------------------------------------------------------------------------ what they send


def adapter_blob(site: str, round_number: int) -> bytes:
    return random.Random(f"{site} {round_number}").randbytes(ADAPTER_BYTES)


def knowledge_blob(
    site: str,
    round_number: int,
    slice_index: int,
    config: FederationConfig,
    federation_id: str,
    public_set: PublicSet,
) -> bytes:
    cut = config.public_set
    samples = public_set.parts(cut.slices, cut.holdout_share).slices[slice_index]
    header = {"federation_id": federation_id, "round_number": round_number, "slice_index": slice_index}
    return encode(make_knowledge(public_set, samples, vocabulary(WORDS), config, model_id=site, **header))


def llm_adapter(round_number: int, parent: str | None) -> bytes:
    """An adapter that says of which one it is made."""
    return json.dumps({"round": round_number, "parent": parent}).encode()


# ------------------------------------------------------------------------------------------------ a site


class ScriptedSite:
    """The folder holds key.pem, site.json once enrolled, and receipts.jsonl: every receipt that the site has seen."""

    def __init__(self, folder: Path, url: str, token: str) -> None:
        self.folder = folder
        self._url = url
        self._token = token
        folder.mkdir(exist_ok=True)

    def run(self) -> None:
        site_id = self._enrolled()
        key = load_key(self.folder / "key.pem")
        with CoordinatorClient(self._url, SiteKey(site_id, key), retry=PATIENT) as client:
            self._client, self._key = client, key
            self._keys = client.keys().public_keys
            client.put_vocabulary(vocabulary(WORDS).to_bytes())
            client.put_model(SiteModel(model=CARD, private_samples=100))
            self._me = client.me()
            while True:
                try:
                    self._step()
                except Refusal as error:  # as the agent does: said, and asked again
                    log.warning("task.failed", extra={"code": error.code, "reason": error.detail})
                    time.sleep(0.1)

    def _enrolled(self) -> str:
        about, key_file = self.folder / "site.json", self.folder / "key.pem"
        if not key_file.exists():
            save_key(key_file, new_key())
        if not about.exists():
            with CoordinatorClient(self._url, retry=PATIENT) as anyone:
                enrolled = anyone.enrol(self._token, load_key(key_file))
            about.write_text(json.dumps({"site_id": enrolled.site_id}))
        return str(json.loads(about.read_text())["site_id"])

    def _step(self) -> None:
        match self._client.next_task(1.0).task:
            case TrainAndUpload() as task:
                self._upload("knowledge", task)
                if task.upload_adapter:
                    self._upload("adapter", task)
            case Apply() as task:
                for digest in (task.knowledge, task.averaged_adapter):
                    if digest is not None:
                        self._client.fetch_artifact(digest, self.folder / "artifacts")
                self._client.report(task.round_id, a_report())
            case waiting:
                log.info("waiting", extra={"reason": waiting.reason})

    def _upload(self, kind: UploadKind, task: TrainAndUpload) -> None:
        me, name = self._me, self._me.site.name
        if kind == "adapter":
            blob = adapter_blob(name, task.round_number)
        else:
            public_set = PublicSet.from_jsonl(self._public_set().read_bytes())
            blob = knowledge_blob(name, task.round_number, task.slice_index, me.config, me.federation_id, public_set)
        receipt = self._client.upload(kind, task.round_id, blob, self._key, self._keys)
        self._keep(receipt)

    def _public_set(self) -> Path:
        if self._me.public_set is None:
            self._me = self._client.me()
        assert self._me.public_set is not None, "a round begins with a public set"
        return self._client.fetch_artifact(self._me.public_set, self.folder / "artifacts")

    def _keep(self, receipt: UploadReceipt) -> None:
        with (self.folder / "receipts.jsonl").open("a") as file:
            file.write(receipt.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())


def site(arguments: Sequence[str]) -> None:
    """Entry of a process: folder, coordinator's address, enrolment token."""
    folder, url, token = arguments
    configure_logs("site", style="text")
    ScriptedSite(Path(folder), url, token).run()


# ------------------------------------------------------------------------------------------------ an LLM server


def _run(client: CoordinatorClient, folder: Path, job: JobView, report: Report) -> DistillResult | MapResult:
    if not isinstance(job.payload, DistillJob):
        report("mapping", 0, 1)
        names = f"{job.payload.teacher} {job.payload.student} {job.payload.method}"
        return MapResult(artifact=client.put_artifact(names.encode()))
    payload = job.payload
    for upload in payload.uploads:
        for digest in (upload.knowledge, upload.adapter):
            if digest is not None:
                found = client.fetch_artifact(digest, folder).read_bytes()
                assert hashlib.sha256(found).hexdigest() == digest
    for step in range(STEPS):
        report("training", step, STEPS)
    taught = {upload.site: 1 for upload in payload.uploads}
    result = DistillResult(
        knowledge=client.put_artifact(f"knowledge of round {payload.round_number}".encode()),
        adapter=client.put_artifact(llm_adapter(payload.round_number, payload.adapter)),
        averaged_adapter=client.put_artifact(f"average of round {payload.round_number}".encode() * 1000),
        selection=SelectionReport(taught=taught),
        gate=GateReport(decision="kept", before_bits_per_byte=1.5, after_bits_per_byte=1.4),
        before={"all": Evaluation(bits_per_byte=1.5, accuracy=0.5, samples=2)},
        after={"all": Evaluation(bits_per_byte=1.4, accuracy=0.6, samples=2)},
        training=None,
    )
    report("published", 1, 1)
    return result


def worker(arguments: Sequence[str]) -> None:
    """Entry of a process: folder, coordinator's address, worker's token."""
    folder, url, token = Path(arguments[0]), arguments[1], StaticToken(arguments[2])
    configure_logs("worker", style="text")
    fault_points.arm(os.environ)
    stop = StopFlag()
    with (
        CoordinatorClient(url, token, retry=PATIENT) as client,
        CoordinatorClient(url, token, retry=QUICK, timeout_s=2) as heartbeats,
    ):
        registrar = Registrar(client, vocabulary(WORDS), CARD, stop)
        threading.Thread(target=registrar.run, args=(0.2,), daemon=True).start()
        Worker(
            client,
            heartbeats,
            client.queue,
            lambda job, report: _run(client, folder / "artifacts", job, report),
            name=lasting_name(folder),
            stop=stop,
            on_job=lambda lease: None,
        ).run()

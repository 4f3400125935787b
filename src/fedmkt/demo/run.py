"""`fedmkt demo`: a whole federation of real processes over HTTP, watched, measured against its control arms."""

import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedmkt.client import CoordinatorClient, RetryPolicy, StaticToken
from fedmkt.demo.controls import RoundResult, Setting, llm_control, site_control
from fedmkt.demo.processes import Household, Service
from fedmkt.demo.report import DemoReport, control_reports, party_reports, round_reports, show, traffic
from fedmkt.demo.setup import DemoOptions, ModelSource, Setup, prepare
from fedmkt.demo.workers import Call, run_calls
from fedmkt.errors import Refusal
from fedmkt.protocol import FederationView, RoundView
from fedmkt.watch import Activity, Sight, Watcher, finished, follow

HOST = "127.0.0.1"
START_S = 60.0  # for the coordinator to answer
READY_S = 300.0  # for the first round to begin
ANSWER_S = 0.5  # of a status page
POLL_S = 1.0
# On one machine nothing is gained by waiting: short leases, sweeps and polls, so that a dead process is missed soon.
QUICK = {
    "FEDMKT_LEASE_S": "10",
    "FEDMKT_KEEPER_INTERVAL_S": "0.2",
    "FEDMKT_POLL_RECHECK_S": "0.3",
    "FEDMKT_POLL_S": "5",
}
WORKERS = 2  # control arms at a time
PRIVATE_HOLDOUT_SHARE = 0.05  # of a site's private text: enough for its gate
LOG_WIDTH = 140  # of the tables, where no terminal says
FAILED, INTERRUPTED = 1, 130
MADE_HERE = ("state", "logs", "data", "report.json")  # what a run replaces in its folder


class DemoInUse(Refusal):
    code = "demo.in_use"
    title = "Another demo runs in this folder"


class DemoStuck(Refusal):
    code = "demo.stuck"
    title = "The demo does not get going"


@dataclass
class Demo:
    """One run: its folder, its services, and what it has measured so far."""

    options: DemoOptions
    setup: Setup
    console: Console
    household: Household
    notes: list[str]  # what the household did, newest last
    seconds: dict[str, float]
    status_urls: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.options.out.resolve() / "state"

    @property
    def logs(self) -> Path:
        return self.options.out.resolve() / "logs"

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = round(time.monotonic() - began, 3)


def run_demo(options: DemoOptions) -> int:
    """Everything, from texts to report; the exit status is 0 only if every round completed."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    options.out.mkdir(parents=True, exist_ok=True)
    with _folder(options.out):
        try:
            report = _run(options, console)
        except KeyboardInterrupt:
            console.print("interrupted; every process of the demo has ended", style="yellow")
            return INTERRUPTED
    path = options.out / "report.json"
    path.write_text(report.model_dump_json(indent=2) + "\n")
    show(report, console)
    console.print(f"report: {path}; seconds: {json.dumps(report.seconds)}", highlight=False, soft_wrap=True)
    return 0 if report.completed else FAILED


def _run(options: DemoOptions, console: Console) -> DemoReport:
    began = time.monotonic()
    with _bars(console) as bars:
        setup = prepare(options, bars.update)
    prepared_s = time.monotonic() - began
    notes: list[str] = []
    with Household(on_restart=notes.append) as household:
        demo = Demo(options, setup, console, household, notes, {"prepare": round(prepared_s, 3)})
        view, rounds = _federate(demo)
    controls = _controls(demo, rounds) if options.controls else {}
    domains = {site.name: site.domain for site in setup.sites}
    models = {"llm": view.llm, **{site.name: site.model for site in view.sites}}
    demo.seconds["total"] = round(time.monotonic() - began, 3)
    return DemoReport(
        federation_id=view.federation_id,
        config=view.config,
        rounds=round_reports(rounds),
        parties=party_reports(rounds, domains, models),
        controls=control_reports(controls, [each.number for each in rounds], domains),
        traffic=traffic(rounds),
        seconds=demo.seconds,
        restarts={service.name: service.restarts for service in household.services if service.restarts},
    )


# ------------------------------------------------------------------------------------------------ the federation


def _federate(demo: Demo) -> tuple[FederationView, tuple[RoundView, ...]]:
    """Start everything, run the rounds, end everything."""
    with demo.measure("start"):
        client, url = _start_coordinator(demo)
        with client:
            federation_id = _create(demo, client, url)
    # The coordinator may be away for a moment; the watcher bears that, so its client need not be patient.
    impatient = RetryPolicy(first_wait_s=0.1, max_wait_s=0.5, patience_s=1.0)
    with demo.measure("rounds"), _client(demo, url, impatient) as client:
        watcher = Watcher(client, federation_id)
        sight = _follow(demo, watcher)
        with demo.measure("stop"):
            demo.household.end()
    return sight.federation, sight.rounds


def _start_coordinator(demo: Demo) -> tuple[CoordinatorClient, str]:
    """The coordinator with its embedded Redis and SQLite; makes the credentials that everybody else needs."""
    port = _free_port()
    state = demo.state / "coordinator"
    arguments = ["run", "--state-dir", str(state), "--host", HOST, "--port", str(port)]
    _start(demo, "coordinator", "fedmkt_coordinator", arguments, QUICK)
    url = f"http://{HOST}:{port}"
    deadline = time.monotonic() + START_S
    while not ((state / "credentials.json").exists() and _answers(f"{url}/readyz")):
        if time.monotonic() > deadline:
            raise DemoStuck(f"the coordinator did not answer within {START_S:g} s; see {demo.logs / 'coordinator.log'}")
        demo.household.check()
        time.sleep(0.1)
    return _client(demo, url, RetryPolicy(patience_s=30.0)), url


def _create(demo: Demo, client: CoordinatorClient, url: str) -> str:
    """The federation, its public set, and every other process; the rounds begin as soon as all are ready."""
    setup = demo.setup
    client.check_version()
    view = client.create_federation(setup.config)
    client.put_public_set(view.federation_id, setup.public_file.read_bytes())
    worker_token = demo.state / "worker.token"
    _write_secret(worker_token, _credentials(demo)["worker"])
    llm = [*_model_arguments(setup.llm), "--token-file", str(worker_token), "--threads", "1"]
    _start_party(demo, "llm-server", "fedmkt_llm_server", url, llm)
    for site in setup.sites:
        token = demo.state / f"{site.name}.token"
        _write_secret(token, client.issue_enrolment_token(view.federation_id, site.name).token)
        arguments = [*_model_arguments(site.model), "--enrolment-token-file", str(token), "--threads", "1"]
        arguments += ["--private", str(site.private_file), "--holdout-share", str(PRIVATE_HOLDOUT_SHARE)]
        _start_party(demo, site.name, "fedmkt_client_agent", url, arguments)
    client.request_rounds(view.federation_id, setup.rounds)
    watch = f"fedmkt rounds watch {view.federation_id} --coordinator {url}"
    path = demo.options.out / "state" / "coordinator" / "credentials.json"
    demo.console.print(f"to look from elsewhere: {watch} --credentials {path}", highlight=False, soft_wrap=True)
    return view.federation_id


def _follow(demo: Demo, watcher: Watcher) -> Sight:
    """Until all rounds have ended. What dies meanwhile is started again."""
    started = time.monotonic()

    def look() -> Sight:
        sight = watcher.look()
        begun = sight.federation.current_round is not None or sight.rounds
        if not begun and time.monotonic() - started > READY_S:
            missing = "; ".join(sight.federation.waits_for)
            raise DemoStuck(f"no round began within {READY_S:g} s: waits for {missing}; see {demo.logs}")
        return Sight(sight.federation, sight.rounds, _activities(demo), (*demo.notes[-3:], *sight.notes))

    def wait(seconds: float) -> None:
        demo.household.check()
        time.sleep(seconds)

    return follow(look, until=finished(demo.setup.rounds), console=demo.console, poll_s=POLL_S, wait=wait)


def _activities(demo: Demo) -> tuple[Activity, ...]:
    """What the agents say on their status pages; one that is busy or being started again says nothing."""
    found = []
    for name, url in demo.status_urls.items():
        with suppress(httpx.HTTPError, ValueError):
            status: dict[str, Any] = httpx.get(f"{url}/status", timeout=ANSWER_S, trust_env=False).json()
            if status.get("state") == "working" and status.get("step"):
                found.append(Activity(name, status["step"], status.get("done", 0), status.get("total", 0)))
    return tuple(found)


# ------------------------------------------------------------------------------------------------ processes


def _start_party(demo: Demo, name: str, module: str, url: str, arguments: list[str]) -> None:
    """The LLM server or an agent, with a folder and, for an agent, a status page of its own."""
    common = ["--coordinator", url, "--state-dir", str(demo.state / name)]
    if module == "fedmkt_client_agent":
        port = _free_port()
        demo.status_urls[name] = f"http://{HOST}:{port}"
        common += ["--status-port", str(port)]
    _start(demo, name, module, [*common, *arguments], QUICK)


def _start(demo: Demo, name: str, module: str, arguments: list[str], settings: Mapping[str, str]) -> None:
    demo.logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *arguments]
    demo.household.start(Service(name, command, _environment() | dict(settings), demo.logs / f"{name}.log"))


def _environment() -> dict[str, str]:
    """Ours without FEDMKT_ settings, which are for another installation; loopback never through a proxy."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FEDMKT_")}
    exempt = ",".join(filter(None, [kept.get("NO_PROXY") or kept.get("no_proxy"), HOST, "localhost"]))
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | {"NO_PROXY": exempt, "no_proxy": exempt, "PYTHONUNBUFFERED": "1"} | threads


def _model_arguments(model: ModelSource) -> list[str]:
    revision = [] if model.revision is None else ["--revision", model.revision]
    return ["--model", model.source, *revision]


def _client(demo: Demo, url: str, retry: RetryPolicy) -> CoordinatorClient:
    operator = StaticToken(_credentials(demo)["operator"])
    return CoordinatorClient(url, operator, retry=retry, timeout_s=10.0, transport=httpx.HTTPTransport())


def _credentials(demo: Demo) -> dict[str, str]:
    found: dict[str, str] = json.loads((demo.state / "coordinator" / "credentials.json").read_bytes())
    return found


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=ANSWER_S, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _write_secret(path: Path, content: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(content)


# ------------------------------------------------------------------------------------------------ control arms


def _controls(demo: Demo, rounds: tuple[RoundView, ...]) -> dict[str, dict[str, list[RoundResult]]]:
    """Every party through every arm, for as many rounds on the same slices; WORKERS processes at a time."""
    setup = demo.setup
    played = tuple((each.number, each.slice_index) for each in rounds)

    def setting(model: ModelSource) -> Setting:
        return Setting(model.source, model.revision, setup.public_file, setup.config, played)

    calls = {}
    for site in setup.sites:  # the LLM's are the shortest and come last, so that no worker ends long before the other
        arguments = {
            "setting": setting(site.model),
            "private_file": site.private_file,
            "private_holdout_share": PRIVATE_HOLDOUT_SHARE,
        }
        calls[site.name] = Call(site_control, arguments)
    calls["llm"] = Call(llm_control, {"setting": setting(setup.llm)})
    with demo.measure("controls"), _bars(demo.console) as bars:
        return run_calls(calls, workers=WORKERS, on_progress=lambda n, d, t: bars.update(f"control arms of {n}", d, t))


# ------------------------------------------------------------------------------------------------ the terminal


class Bars:
    """Named progress bars; on something that is no terminal, a line when one begins and one when it ends."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self._said: set[tuple[str, bool]] = set()

    def update(self, name: str, done: int, total: int) -> None:
        if self._console.is_terminal:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total)
            self._progress.update(self._tasks[name], completed=done, total=total)
            return
        key = (name, done >= total)
        if key not in self._said:
            self._said.add(key)
            self._console.print(f"{name}: {done} of {total}", highlight=False, markup=False)


@contextmanager
def _bars(console: Console) -> Iterator[Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bars(console, progress)


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """This run's alone; what an earlier run made in it is removed. Raises DemoInUse."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DemoInUse(f"a demo runs in {out}; wait for it, or choose another folder with --out") from error
        for name in MADE_HERE:
            path = out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        yield


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

"""The `fedmkt` command as a person or a script meets it: help, refusals, exit statuses, and an operator's work."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from fedmkt import __version__, cli
from fedmkt.errors import Refusal
from fedmkt.protocol import PROTOCOL_VERSION
from fedmkt.vocab_map import VocabMap
from fedmkt.vocabulary import Vocabulary
from live_coordinator import TOKENS, LiveCoordinator, stories, tiny_config
from small_tokenizers import byte_level, sentencepiece_bpe

HELP_CPU_S = 0.7


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FEDMKT_")]:
        monkeypatch.delenv(name)


class Run:
    """The command in this process; output and exit status as a shell would see them."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self._monkeypatch.setattr(sys, "argv", ["fedmkt", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        self.out, self.err = self._capsys.readouterr()
        return ended.value.code if isinstance(ended.value.code, int) else 0


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(capsys, monkeypatch)


# ------------------------------------------------------------------------------------------------ help and refusals


def commands(app: typer.main.TyperGroup | object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Path and help of every command below `app` that this package brings itself."""
    for name, command in getattr(app, "commands", {}).items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        elif (*path, name)[0] not in cli.SERVICES:
            yield " ".join((*path, name)), command.help or ""


def test_every_command_has_an_example_that_names_it() -> None:
    found = dict(commands(typer.main.get_command(cli.app)))
    assert set(found) == {
        *("demo", "doctor", "evaluate", "version", "vocab-map", "federation create", "federation show"),
        *(
            "audit export",
            "audit verify",
            "data check",
            "knowledge inspect",
            "site token",
            "rounds start",
            "rounds watch",
        ),
        *("rounds pause", "rounds resume", "rounds cancel"),
        *("adapter list", "adapter promote", "adapter rollback", "adapter download", "adapter export"),
    }
    for name, text in found.items():
        assert f"Example: fedmkt {name}" in text, name


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic', 'httpx', 'fastapi', 'tokenizers'}"
    code = (
        "import sys; from fedmkt import cli; sys.argv = ['fedmkt', '--help']\n"
        f"try: cli.main()\nfinally: assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for name in ("demo", "doctor", "coordinator", "llm-server", "agent", "rounds", "vocab-map"):
        assert name in shown.stdout
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s < HELP_CPU_S * 2  # twice: other tests share the machine's caches and cores


def test_the_console_script_is_this_command() -> None:
    script = Path(sys.executable).parent / "fedmkt"
    shown = subprocess.run([script, "version", "--json"], check=True, capture_output=True, text=True)
    assert json.loads(shown.stdout) == {"version": __version__, "protocol_version": PROTOCOL_VERSION}


def test_a_service_s_own_help_is_shown(run: Run) -> None:
    assert run("agent", "--help") == 0
    assert "fedmkt agent" in run.out
    assert "--private" in run.out


def test_a_service_gets_its_arguments(run: Run, tmp_path: Path) -> None:
    assert run("coordinator", "init", "--state-dir", str(tmp_path / "state")) == 0
    assert (tmp_path / "state" / "credentials.json").exists()


def test_a_part_that_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(cli.ExtraMissing, match=r"`fedmkt crystal-ball` .*: pip install 'fedmkt\[magic\]'"):
        cli._load_service("crystal-ball", "magic")


def test_a_missing_extra_is_one_line_and_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fedmkt_coordinator.command", None)
    monkeypatch.setattr(cli, "entry_points", lambda **_: [Lacking()])
    assert run("coordinator", "run") == 1
    assert run.err == "fedmkt: `fedmkt coordinator` needs fastapi: pip install 'fedmkt[coordinator]'\n"


class Lacking:
    """An entry point whose module imports what is not there."""

    def load(self) -> object:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")


def test_a_refusal_is_one_line_and_status_1(run: Run) -> None:
    assert run("demo", "--slm", "clinic") == 1
    assert run.err == "fedmkt: --slm 'clinic' is not SITE=PATH, for example --slm clinic=folder\n"


def test_a_site_may_be_named_once(run: Run) -> None:
    assert run("demo", "--slm", "a=x", "--slm", "a=y") == 1
    assert "--slm names 'a' twice" in run.err


def test_misuse_is_status_2(run: Run) -> None:
    assert run("demo", "--rounds", "0") == 2
    assert run("no-such-command") == 2


def test_ctrl_c_is_status_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    assert run() == 130
    assert run.err == "fedmkt: interrupted\n"


def test_a_message_over_several_lines_becomes_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise Refusal("first\n  second")

    monkeypatch.setattr(cli, "app", refuse)
    assert run() == 1
    assert run.err == "fedmkt: first second\n"


# ------------------------------------------------------------------------------------------------ vocabulary maps


@pytest.fixture
def tokenizers(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "teacher", tmp_path / "student"
    for folder, tokenizer in zip(folders, (byte_level(), sentencepiece_bpe()), strict=True):
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
    return folders


def test_a_vocabulary_map_is_written_and_reported(run: Run, tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = tokenizers
    out = tmp_path / "map.safetensors"
    assert run("vocab-map", str(teacher), str(student), "--method", "mined", "--out", str(out), "--json") == 0
    told = json.loads(run.out)
    built = VocabMap.from_bytes(out.read_bytes())
    assert (built.method, built.teacher_fingerprint) == ("mined", Vocabulary.from_tokenizer(teacher).fingerprint)
    assert told["size_bytes"] == out.stat().st_size
    exact = sum(built.distances == 0)
    assert told["coverage"]["all tokens"]["exact"] == exact > 0
    on_text = told["on_text"]
    assert on_text["text"] == "Python's documentation"
    assert 0 < on_text["gold_transfer"] < on_text["gold_transfer_chain_rule"] <= 1


def test_a_vocabulary_map_is_shown_as_a_table(
    run: Run, tokenizers: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("vocab-map", "teacher", "student") == 0
    assert (tmp_path / "teacher-student-retokenized.safetensors").exists()
    rows = {line.split("  ")[0].strip(): line.split() for line in run.out.splitlines()}
    assert rows["digits"][2].endswith("%")
    assert "all tokens" in rows
    assert "of the rows supervised" in run.out


def test_a_vocabulary_map_is_shown_on_a_text_of_ones_own(
    run: Run, tokenizers: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("public.jsonl").write_text(json.dumps({"text": "été"}))
    assert run("vocab-map", "teacher", "student", "--text", "public.jsonl", "--json") == 0
    teacher, student = (Vocabulary.from_tokenizer(folder).encode("été").ends.tolist() for folder in tokenizers)
    told = json.loads(run.out)["on_text"]
    assert (told["text"], told["text_bytes"], told["rows"]) == ("public.jsonl", 5, len(student) - 1)
    both = set(student[:-1]) & set(teacher[:-1])  # of contexts with one end (bos, dummy space) one is taught
    assert told["supervised"] == pytest.approx(len(both) / (len(student) - 1))


def test_a_folder_without_a_tokenizer_is_refused(run: Run, tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("vocab-map", str(tmp_path / "empty"), str(tokenizers[0])) == 1
    assert run.err.startswith("fedmkt: ")
    assert "Traceback" not in run.err


# ------------------------------------------------------------------------------------------------ an operator's work


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveCoordinator]:
    live = LiveCoordinator(tmp_path_factory.mktemp("coordinator"))
    live.start()
    yield live
    live.stop()


@pytest.fixture
def operator(coordinator: LiveCoordinator, monkeypatch: pytest.MonkeyPatch) -> LiveCoordinator:
    """The environment of an operator of a running coordinator."""
    monkeypatch.setenv("FEDMKT_COORDINATOR_URL", coordinator.url)
    monkeypatch.setenv("FEDMKT_OPERATOR_TOKEN", TOKENS["operator"])
    return coordinator


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    config, public = tmp_path / "config.json", tmp_path / "public.jsonl"
    config.write_text(tiny_config(("north", "south")).model_dump_json())
    public.write_bytes(stories(0, 20))
    return config, public


@pytest.mark.services
def test_a_federation_is_created_shown_and_given_rounds(
    run: Run, operator: LiveCoordinator, files: tuple[Path, Path]
) -> None:
    config, public = files
    assert run("federation", "create", str(config), "--public", str(public), "--json") == 0
    made = json.loads(run.out)
    assert (made["public_samples"], [site["name"] for site in made["sites"]]) == (20, ["north", "south"])
    federation_id = made["federation_id"]
    assert run("rounds", "start", federation_id, "--count", "2") == 0
    assert run.out.startswith("0 of 2 rounds finished; waits for an LLM server")
    assert run("federation", "show", federation_id) == 0
    assert "north" in run.out
    assert "awaited" in run.out
    assert run("federation", "show") == 0
    assert f"{federation_id}  tiny  2 sites  0 of 2 rounds finished" in run.out
    assert run("rounds", "watch", federation_id, "--json") == 0
    assert json.loads(run.out)["federation"]["rounds_requested"] == 2


@pytest.mark.services
def test_a_configuration_may_be_toml(run: Run, operator: LiveCoordinator, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('name = "clinics"\nsites = ["north"]\n[schedule]\nquorum = 1\n')
    assert run("federation", "create", str(tmp_path / "config.toml"), "--json") == 0
    assert json.loads(run.out)["config"]["name"] == "clinics"


@pytest.mark.services
def test_a_site_s_token_goes_to_a_file_of_its_owner_alone(
    run: Run, operator: LiveCoordinator, files: tuple[Path, Path], tmp_path: Path
) -> None:
    assert run("federation", "create", str(files[0]), "--json") == 0
    federation_id = json.loads(run.out)["federation_id"]
    out = tmp_path / "north.token"
    assert run("site", "token", federation_id, "north", "--out", str(out)) == 0
    assert out.stat().st_mode & 0o777 == 0o600
    assert out.read_text().strip() not in run.out
    assert run("site", "token", federation_id, "south") == 0
    assert len(run.out.strip()) >= 20
    assert run("site", "token", federation_id, "nowhere") == 1
    assert "nowhere" in run.err


@pytest.mark.services
def test_the_operator_s_token_is_found_in_the_coordinator_s_folder(
    run: Run, operator: LiveCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDMKT_OPERATOR_TOKEN")
    assert run("federation", "show", "--credentials", str(tmp_path / "absent.json")) == 1
    assert run.err.startswith("fedmkt: no operator's token: set FEDMKT_OPERATOR_TOKEN")
    (tmp_path / "credentials.json").write_text(json.dumps({"operator": TOKENS["operator"]}))
    monkeypatch.setenv("FEDMKT_STATE_DIR", str(tmp_path))
    assert run("federation", "show") == 0


@pytest.mark.services
def test_a_wrong_configuration_names_the_field_and_is_misuse(
    run: Run, operator: LiveCoordinator, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"name": "clinics", "sites": ["north"], "schedule": {"quorum": 2}}')
    assert run("federation", "create", str(tmp_path / "config.json")) == 2
    assert run.err == "fedmkt: Value error, quorum is 2 but only 1 sites are named; 1 <= quorum <= sites\n"
    (tmp_path / "config.json").write_text("{")
    assert run("federation", "create", str(tmp_path / "config.json")) == 1
    assert "write JSON, or TOML" in run.err


@pytest.mark.services
def test_a_refusal_of_the_coordinator_is_passed_on(run: Run, operator: LiveCoordinator) -> None:
    assert run("rounds", "watch", "fed_00000000000000000000000000000000") == 1
    assert run.err.count("\n") == 1


def test_a_coordinator_that_is_not_there_is_said_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmkt.operator_commands.PATIENCE_S", 0.2)
    monkeypatch.setenv("FEDMKT_OPERATOR_TOKEN", "token")
    assert run("federation", "show", "--coordinator", "http://127.0.0.1:9") == 1
    assert "check the address" in run.err

"""The Helm chart: linted and rendered by Helm's own library, its manifests held against Kubernetes' schemas.

Needs the extra `chart` (Helm's library and the schemas, 350 MB on disk), which is not in `dev`.
"""

import importlib.util
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmkt import __version__
from fedmkt_coordinator.settings import Settings as CoordinatorSettings
from fedmkt_llm_server.settings import Settings as LlmServerSettings

REPOSITORY = Path(__file__).resolve().parent.parent
CHART = REPOSITORY / "deploy" / "helm" / "fedmkt"

needs_helm = pytest.mark.skipif(
    not (importlib.util.find_spec("helm_python") and importlib.util.find_spec("kubernetes_validate")),
    reason="Helm and Kubernetes' schemas are not installed: pip install --editable '.[chart]'",
)

# In a process of its own: Helm is written in Go, whose runtime takes over a process's signals.
HELM = """
import json, sys
from helm_python.chart import Chart, lint
values = json.load(sys.stdin)
if sys.argv[2] == "lint":
    print(json.dumps(lint(sys.argv[1], values, strict=True)))
else:
    with Chart.load(sys.argv[1]) as chart:
        chart.validate_schema(values)
        print(json.dumps(chart.render(values, name="north", namespace="federations")))
"""

REQUIRED: dict[str, Any] = {
    "database": {"existingSecret": "postgres"},
    "redis": {"existingSecret": "redis"},
    "tokens": {"existingSecret": "tokens"},
    "artifacts": {"url": "s3://bucket/prefix"},
    "coordinator": {"image": "registry.example.org/coordinator:1"},
    "llmServer": {"image": "registry.example.org/llm-server:1", "model": "/models/big"},
}
EVERYTHING: dict[str, Any] = {
    "database": {"existingSecret": "postgres", "key": "uri"},
    "redis": {"existingSecret": "redis"},
    "tokens": {"existingSecret": "tokens"},
    "artifacts": {
        "url": "s3://bucket/prefix", "endpoint": "https://s3.example.org", "region": "eu-central-1",
        "existingSecret": "bucket",
    },
    "coordinator": {
        "image": "registry.example.org/coordinator:1", "serviceAccountName": "bucket-reader",
        "autoscaling": {"enabled": True}, "env": {"FEDMKT_LEASE_S": "60"}, "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "spot", "operator": "Exists"}], "maxUnavailable": "50%",
    },
    "llmServer": {
        "image": "registry.example.org/llm-server@sha256:00", "model": "org/big", "modelRevision": "0" * 40,
        "modelClaim": "models", "gpus": 4, "shard": True, "serviceAccountName": "plain",
        "autoscaling": {"enabled": True}, "state": {"storageClassName": "ssd"},
        "env": {"FEDMKT_DTYPE": "bfloat16"}, "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
    },
    "ingress": {
        "enabled": True, "className": "nginx", "host": "fedmkt.example.org", "tlsSecret": "certificate",
        "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "2m"},
    },
    "networkPolicy": {"llmServerPorts": [6379, 443]},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
}  # fmt: skip


def helm(action: str, values: dict[str, Any]) -> Any:
    command = [sys.executable, "-c", HELM, str(CHART), action]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ValueError(done.stderr)
    return json.loads(done.stdout)


def manifests(values: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Kind and the name without the release's part -> manifest."""
    found = {}
    for path, text in helm("render", values).items():
        if path.endswith(".yaml"):
            for each in yaml.safe_load_all(text):
                if each is not None:
                    found[each["kind"], each["metadata"]["name"].removeprefix("north-fedmkt").lstrip("-")] = each
    return found


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, str], Any]:
    return manifests(REQUIRED)


@pytest.fixture(scope="module")
def full() -> dict[tuple[str, str], Any]:
    return manifests(EVERYTHING)


def pods(found: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """Component -> pod template."""
    templates = [each["spec"]["template"] for each in found.values() if "template" in each.get("spec", {})]
    return {each["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in templates}


def container(pod: Any) -> Any:
    (only,) = pod["spec"]["containers"]
    return only


def environment(pod: Any) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container(pod)["env"]}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, f"{path}.{name}")
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each, f"{path}[]")
    else:
        yield path, value


# ------------------------------------------------------------------------------------------- without Helm


def test_the_chart_is_of_the_projects_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_every_value_has_its_rule_and_every_rule_its_value() -> None:
    def compare(values: dict[str, Any], rules: dict[str, Any], where: str) -> None:
        assert set(values) == set(rules["properties"]), where
        for name, value in values.items():
            rule = rules["properties"][name]
            if isinstance(value, dict) and "properties" in rule:
                assert rule["additionalProperties"] is False, f"{where}.{name}: a misspelt value would pass"
                compare(value, rule, f"{where}.{name}")

    rules = json.loads((CHART / "values.schema.json").read_text())
    del rules["properties"]["global"]  # Helm's own
    compare(yaml.safe_load((CHART / "values.yaml").read_text()), rules, "values")


def test_the_database_is_brought_to_the_present_schema_by_a_command_that_may_be_repeated(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedmkt_coordinator", "migrate"]
    for _ in range(2):
        done = subprocess.run(
            command, env={"FEDMKT_STATE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=True
        )
        assert "present schema" in done.stdout
    with sqlite3.connect(tmp_path / "fedmkt.sqlite") as database:
        (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
    database.close()
    versions = REPOSITORY / "services/coordinator/fedmkt_coordinator/migrations/versions"
    newest = max(versions.glob("[0-9]*.py")).read_text()
    assert re.search(rf'^revision.*= "{revision}"', newest, re.MULTILINE), revision


# ---------------------------------------------------------------------------------------------- with Helm


@needs_helm
@pytest.mark.parametrize("values", [REQUIRED, EVERYTHING], ids=["required", "everything"])
def test_the_chart_is_linted(values: dict[str, Any]) -> None:
    report = helm("lint", values)
    assert not report["errors"]
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]


@needs_helm
def test_the_values_of_the_documentation_are_enough() -> None:
    (block,) = re.findall(r"```yaml\n(.+?)```", (REPOSITORY / "docs" / "scale.md").read_text(), re.DOTALL)
    assert ("Ingress", "") in manifests(yaml.safe_load(block))


@needs_helm
@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_every_manifest_is_what_kubernetes_expects(
    version: str, plain: dict[tuple[str, str], Any], full: dict[tuple[str, str], Any]
) -> None:
    from kubernetes_validate import validate

    kinds = set()
    for manifest in [*plain.values(), *full.values()]:
        if manifest["kind"] != "ServiceMonitor":  # the Prometheus operator's
            validate(manifest, version, strict=True)
            kinds.add(manifest["kind"])
    expected = "Deployment StatefulSet Job Service Ingress NetworkPolicy PodDisruptionBudget HorizontalPodAutoscaler"
    assert kinds == set(expected.split())


@needs_helm
def test_a_manifest_with_a_misspelt_field_is_found(plain: dict[tuple[str, str], Any]) -> None:
    from kubernetes_validate import ValidationError, validate

    wrong = json.loads(json.dumps(plain["Deployment", "coordinator"]))
    container(wrong["spec"]["template"])["readynessProbe"] = {}
    with pytest.raises(ValidationError, match="readynessProbe"):
        validate(wrong, "1.37", strict=True)


@needs_helm
def test_every_environment_variable_is_a_setting_of_its_service(full: dict[tuple[str, str], Any]) -> None:
    elsewhere = {"FEDMKT_SECRETS_DIR", "HF_HOME"}  # read beside the settings, and by the hub's library
    settings = {"coordinator": CoordinatorSettings, "migration": CoordinatorSettings, "llm-server": LlmServerSettings}
    for component, pod in pods(full).items():
        known = {f"FEDMKT_{name.upper()}" for name in settings[component].model_fields} | elsewhere
        aws = {"AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        documented = aws & set(re.findall(r"AWS_\w+", (REPOSITORY / "docs/operations.md").read_text()))
        assert set(environment(pod)) <= known | documented, component
    files = [item["path"] for path, item in secret_items(pods(full)["coordinator"])]
    assert {name.removeprefix("fedmkt_") for name in files} <= set(CoordinatorSettings.model_fields)


def secret_items(pod: Any) -> Iterator[tuple[str, Any]]:
    for volume in pod["spec"]["volumes"]:
        for source in volume.get("projected", {}).get("sources", []):
            for item in source["secret"]["items"]:
                yield source["secret"]["name"], item


@needs_helm
def test_the_variables_of_the_chart_make_valid_settings(full: dict[tuple[str, str], Any]) -> None:
    given = {
        name.removeprefix("FEDMKT_").lower(): value
        for name, value in environment(pods(full)["llm-server"]).items()
        if name.startswith("FEDMKT_")
    }
    read = LlmServerSettings(**given)
    assert (read.coordinator_url, read.shard, read.status_port) == ("http://north-fedmkt-coordinator:8700", True, 8701)


@needs_helm
def test_pods_are_as_hardened_as_the_containers_of_the_compose_file(full: dict[tuple[str, str], Any]) -> None:
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    hardened = compose["services"]["coordinator"]
    users = {
        int(re.findall(r"useradd --uid (\d+)", path.read_text())[0])
        for path in (REPOSITORY / "services").glob("*/Dockerfile")
    }
    assert len(pods(full)) == 3
    for pod in pods(full).values():
        rights, spec = container(pod)["securityContext"], pod["spec"]
        assert rights["readOnlyRootFilesystem"] is hardened["read_only"] is True
        assert rights["capabilities"]["drop"] == hardened["cap_drop"] == ["ALL"]
        assert rights["allowPrivilegeEscalation"] is False
        assert hardened["security_opt"] == ["no-new-privileges:true"]
        empty = {each["name"] for each in spec["volumes"] if "emptyDir" in each}
        mounted = {each["mountPath"] for each in container(pod)["volumeMounts"] if each["name"] in empty}
        assert set(hardened["tmpfs"]) <= mounted
        assert {spec["securityContext"]["runAsUser"]} == users
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False  # a Service called fedmkt would set FEDMKT_PORT=tcp://...


@needs_helm
def test_what_compose_sets_for_the_llm_server_the_chart_sets_too(plain: dict[tuple[str, str], Any]) -> None:
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
    assert set(compose["services"]["llm-server"]["environment"]) <= set(environment(pods(plain)["llm-server"]))


@needs_helm
def test_secrets_are_references_alone(full: dict[tuple[str, str], Any]) -> None:
    assert not [kind for kind, _ in full if kind in ("Secret", "ConfigMap")]
    assert [(name, item["key"], item["path"]) for name, item in secret_items(pods(full)["coordinator"])] == [
        ("postgres", "uri", "fedmkt_database_url"),
        ("redis", "url", "fedmkt_redis_url"),
        ("tokens", "operator", "fedmkt_operator_token"),
        ("tokens", "viewer", "fedmkt_viewer_token"),
        ("tokens", "worker", "fedmkt_worker_token"),
    ]
    assert [(name, item["key"], item["path"]) for name, item in secret_items(pods(full)["llm-server"])] == [
        ("tokens", "worker", "token")
    ]
    key = environment(pods(full)["coordinator"])["AWS_SECRET_ACCESS_KEY"]
    assert key == {"secretKeyRef": {"name": "bucket", "key": "secret-access-key"}}


@needs_helm
@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({**REQUIRED, "database": {}}, "existingSecret"),
        ({**REQUIRED, "coordinator": {}}, "image"),
        ({**REQUIRED, "coordinator": {"image": "a:1", "replica": 2}}, "replica"),
        ({**REQUIRED, "coordinator": {"image": "a:1", "env": {"FEDMKT_OPERATOR_TOKEN": "s3cret"}}}, "FEDMKT_OPERATOR"),
        ({**REQUIRED, "llmServer": {"image": "a:1", "model": "org/big"}}, "modelRevision"),
        ({**REQUIRED, "llmServer": {**REQUIRED["llmServer"], "gpus": 1, "shard": True}}, "gpus"),
        ({**REQUIRED, "artifacts": {"url": "/data/artifacts"}}, "s3://"),
        ({**REQUIRED, "ingress": {"enabled": True, "host": "fedmkt.example.org"}}, "tlsSecret"),
        ({**REQUIRED, "networkPolicy": {"coordinatorPorts": []}}, "coordinatorPorts"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_values_that_cannot_work_are_refused_before_anything_is_installed(
    values: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        helm("render", values)


@needs_helm
def test_the_migration_runs_before_the_first_replica_and_with_its_secrets(plain: dict[tuple[str, str], Any]) -> None:
    job, pod = plain["Job", "migration"], pods(plain)["migration"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert container(pod)["command"] == ["python", "-m", "fedmkt_coordinator", "migrate"]
    assert container(pod)["image"] == container(pods(plain)["coordinator"])["image"]
    assert list(secret_items(pod)) == list(secret_items(pods(plain)["coordinator"]))


@needs_helm
def test_probes_ask_pages_that_the_services_have(plain: dict[tuple[str, str], Any]) -> None:
    for component in ("coordinator", "llm-server"):
        probed = container(pods(plain)[component])
        ports = {each["name"] for each in probed["ports"]}
        for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
            assert probed[probe]["httpGet"]["path"] == path
            assert probed[probe]["httpGet"]["port"] in ports


@needs_helm
def test_selectors_find_the_pods_of_their_component_and_no_other(full: dict[tuple[str, str], Any]) -> None:
    labels = {component: pod["metadata"]["labels"] for component, pod in pods(full).items()}

    def selected(selector: dict[str, str]) -> set[str]:
        return {name for name, each in labels.items() if selector.items() <= each.items()}

    for (kind, name), manifest in full.items():
        spec = manifest["spec"]
        if kind == "Service":
            assert selected(spec["selector"]) == {name}
        if kind in ("Deployment", "StatefulSet", "PodDisruptionBudget", "ServiceMonitor"):
            assert selected(spec["selector"]["matchLabels"]) == {name}
        if kind == "HorizontalPodAutoscaler":
            assert (spec["scaleTargetRef"]["kind"], name) in full
            assert "replicas" not in full[spec["scaleTargetRef"]["kind"], name]["spec"]
    assert selected(full["NetworkPolicy", "llm-server"]["spec"]["podSelector"]["matchLabels"]) == {"llm-server"}
    (chosen,) = full["NetworkPolicy", "coordinator"]["spec"]["podSelector"]["matchExpressions"]
    assert (chosen["operator"], chosen["values"]) == ("In", ["coordinator", "migration"])


@needs_helm
def test_nothing_goes_out_but_to_the_ports_that_are_named(plain: dict[tuple[str, str], Any]) -> None:
    def outwards(name: str) -> list[int]:
        spec = plain["NetworkPolicy", name]["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        assert all(rule["ports"] for rule in spec["egress"])
        return sorted({port["port"] for rule in spec["egress"] for port in rule["ports"]})

    assert outwards("coordinator") == [53, 443, 5432, 6379]
    assert outwards("llm-server") == [53, 6379, 8700]


@needs_helm
def test_several_gpus_are_asked_for_and_get_a_process_each(
    plain: dict[tuple[str, str], Any], full: dict[tuple[str, str], Any]
) -> None:
    with_gpus, without = container(pods(full)["llm-server"]), container(pods(plain)["llm-server"])
    assert with_gpus["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": 4}
    assert with_gpus["command"][:2] == ["accelerate", "launch"]
    assert with_gpus["command"][with_gpus["command"].index("--num_processes") + 1] == "4"
    assert environment(pods(full)["llm-server"])["FEDMKT_SHARD"] == "true"
    assert "nvidia.com/gpu" not in without["resources"]["limits"]
    assert "command" not in without
    assert "FEDMKT_SHARD" not in environment(pods(plain)["llm-server"])


@needs_helm
def test_prometheus_reads_the_coordinator_with_the_viewers_token(full: dict[tuple[str, str], Any]) -> None:
    (endpoint,) = full["ServiceMonitor", "coordinator"]["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "tokens", "key": "viewer"}}
    assert full["ServiceMonitor", "llm-server"]["metadata"]["labels"]["release"] == "prometheus"


@needs_helm
def test_nothing_is_rendered_without_a_value(
    plain: dict[tuple[str, str], Any], full: dict[tuple[str, str], Any]
) -> None:
    for found in (plain, full):
        for name, manifest in found.items():
            assert not [path for path, value in leaves(manifest) if value is None or value == ""], name

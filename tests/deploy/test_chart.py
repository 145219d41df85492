"""What the chart renders: valid, restricted, consistent, and every value of it means something."""

from __future__ import annotations

import copy
import filecmp
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
import yaml

from deploy.tools import CHART, ROOT, answered, built, rendered, run, tool
from tokenwire_service import __version__
from tokenwire_service.config import Config, check
from tokenwire_service.settings import RELOADED

ON: dict[str, Any] = {
    "autoscaling": {"inFlight": {"enabled": True}},
    "monitoring": {"enabled": True},
    "grpcRoute": {"enabled": True},
    "image": {"pullSecrets": ["registry"]},
    "envFromSecrets": ["tokens"],
    "env": [{"name": "EXTRA", "value": "1"}],
}
VERSIONS = ("1.32", "1.37")  # the oldest and the newest of which there are schemas
FOREIGN = {"ServiceMonitor", "PrometheusRule", "GRPCRoute"}  # defined by others: no schemas
KUSTOMIZE = ROOT / "deploy/kustomize"


def objects(manifests: dict[str, str]) -> list[dict[str, Any]]:
    texts = [text for name, text in manifests.items() if name != "NOTES.txt"]
    return [one for text in texts for one in yaml.safe_load_all(text) if one]


def only(manifests: dict[str, str], kind: str) -> dict[str, Any]:
    (found,) = [one for one in objects(manifests) if one["kind"] == kind]
    return found


def pod_of(manifests: dict[str, str]) -> dict[str, Any]:
    pod: dict[str, Any] = only(manifests, "Deployment")["spec"]["template"]
    return pod


PRODUCTION = yaml.safe_load((CHART.parent / "values.production.yaml").read_text())


@pytest.fixture(scope="module")
def every() -> list[dict[str, str]]:
    """With the default values, with all that can be switched on, and as the example for production
    has it."""
    return rendered({}, ON, PRODUCTION)


# --- it is what Kubernetes takes --------------------------------------------------------


def test_helm_finds_nothing_to_complain_of() -> None:
    lint = (
        "import helm_python.chart as chart, json, sys;"
        "json.dump(chart.lint(sys.argv[1], json.load(sys.stdin), strict=True), sys.stdout)"
    )
    for values in ({}, ON, PRODUCTION):
        report = json.loads(run(tool("python"), "-c", lint, CHART, stdin=json.dumps(values)))
        told = [message["error"] for message in report["messages"]]
        assert report["errors"] == []
        assert told == ["icon is recommended"]  # there is none


def test_every_object_fits_the_schemas_of_kubernetes(
    every: list[dict[str, str]], tmp_path: Path
) -> None:
    validate = tool("kubernetes-validate")
    files = []
    for number, manifests in enumerate(every):
        for one in objects(manifests):
            if one["kind"] not in FOREIGN:
                path = tmp_path / f"{number}-{one['kind']}-{one['metadata']['name']}.yaml"
                path.write_text(yaml.safe_dump(one))
                files.append(path)
    versions = [part for version in VERSIONS for part in ("-k", version)]
    said = run(validate, "--strict", *versions, *files)
    assert said.count(" passed ") == len(files) * len(VERSIONS)
    kinds = {one["kind"] for one in objects(every[1])}
    assert kinds >= FOREIGN | {"HorizontalPodAutoscaler", "NetworkPolicy"}


# What kube-score would have otherwise, and why it is not so.
_NOT_KEPT = {
    "container-image-pull-policy",  # a tag or a digest names one image for good
    "deployment-has-host-podantiaffinity",  # topologySpreadConstraints do that
}


def test_kube_score_finds_nothing(every: list[dict[str, str]], tmp_path: Path) -> None:
    for number, manifests in enumerate(every):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump_all(objects(manifests)))
        ignored = [part for name in sorted(_NOT_KEPT) for part in ("--ignore-test", name)]
        said = run(
            built("kube-score"),
            *("score", "--output-format", "ci", "--exit-one-on-warning"),
            # A process that is throttled holds up every stream that it carries.
            "--ignore-container-cpu-limit",
            *("--kubernetes-version", f"v{VERSIONS[0]}"),
            *ignored,
            path,
        )
        assert said.count("[OK] tokenwire apps/v1/Deployment") >= 10


def test_pods_keep_the_restricted_standard(every: list[dict[str, str]]) -> None:
    for manifests in every:
        spec = pod_of(manifests)["spec"]
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
        assert {kind for volume in spec["volumes"] for kind in volume} == {
            "name",
            "configMap",
            "secret",
        }
        (container,) = spec["containers"]
        assert all("hostPort" not in port for port in container["ports"])
        for context in (spec["securityContext"], container["securityContext"]):
            assert context["runAsNonRoot"] is True
            assert context["runAsUser"] == context["runAsGroup"] == 65532
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert spec["automountServiceAccountToken"] is False
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


def test_what_names_another_object_finds_it(every: list[dict[str, str]]) -> None:
    for manifests in every:
        everything = objects(manifests)
        named = {(one["kind"], one["metadata"]["name"]) for one in everything}
        pod = pod_of(manifests)
        labels, spec = pod["metadata"]["labels"], pod["spec"]
        (container,) = spec["containers"]
        ports = {port["name"] for port in container["ports"]}
        selectors = []
        for one in everything:
            match one["kind"]:
                case "Service":
                    selectors.append(one["spec"]["selector"])
                    assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports
                case "Deployment" | "PodDisruptionBudget":
                    selectors.append(one["spec"]["selector"]["matchLabels"])
                case "NetworkPolicy":
                    selectors.append(one["spec"]["podSelector"]["matchLabels"])
                    rules = one["spec"]["ingress"]
                    assert {p["port"] for rule in rules for p in rule["ports"]} == ports
                case "HorizontalPodAutoscaler":
                    target = one["spec"]["scaleTargetRef"]
                    assert (target["kind"], target["name"]) in named
                    assert "replicas" not in only(manifests, "Deployment")["spec"]
                case "GRPCRoute":
                    (rule,) = one["spec"]["rules"]
                    (backend,) = rule["backendRefs"]
                    assert ("Service", backend["name"]) in named
                case "ServiceMonitor":
                    wanted = one["spec"]["selector"]["matchLabels"].items()
                    (monitored,) = [
                        service
                        for service in everything
                        if service["kind"] == "Service"
                        and wanted <= service["metadata"]["labels"].items()
                        and any(port["name"] == "metrics" for port in service["spec"]["ports"])
                    ]
                    assert monitored["spec"].get("clusterIP") != "None"
        assert len(selectors) >= 4
        assert all(selector.items() <= labels.items() for selector in selectors)
        assert ("ServiceAccount", spec["serviceAccountName"]) in named
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        (config,) = [volume["configMap"] for volume in spec["volumes"] if "configMap" in volume]
        assert ("ConfigMap", config["name"]) in named
        probes = [
            container[f"{name}Probe"]["grpc"] for name in ("startup", "readiness", "liveness")
        ]
        assert len({probe["service"] for probe in probes}) == 3


def test_who_installs_hears_that_everyone_is_served(every: list[dict[str, str]]) -> None:
    default, _, production = (manifests["NOTES.txt"] for manifests in every)
    assert "WARNING" in default
    assert "WARNING" not in production


def test_the_chart_is_of_the_gateways_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__


def test_one_service_has_an_address_and_one_is_for_clients_that_balance() -> None:
    (manifests,) = rendered({})
    services = {
        one["metadata"]["name"]: one["spec"].get("clusterIP")
        for one in objects(manifests)
        if one["kind"] == "Service"
    }
    assert services == {"tokenwire": None, "tokenwire-headless": "None"}


def test_alerts_and_dashboard_are_those_of_the_monitoring_folder(
    every: list[dict[str, str]],
) -> None:
    folder = ROOT / "deploy/monitoring"
    rules = yaml.safe_load((folder / "rules.yaml").read_text())
    assert only(every[1], "PrometheusRule")["spec"] == rules
    (dashboard,) = [
        one
        for one in objects(every[1])
        if one["metadata"]["labels"].get("grafana_dashboard") == "1"
    ]
    shown = json.loads(dashboard["data"]["tokenwire.json"])
    assert shown == json.loads((folder / "grafana-dashboard.json").read_text())


# --- values -----------------------------------------------------------------------------


DRAINS: list[tuple[dict[str, str] | None, int]] = [
    (None, 5 + 120 + 10),
    ({}, 5 + 120 + 10),
    ({"grace": "10m"}, 5 + 600 + 10),
    ({"propagation": "0s", "grace": "0s"}, 10),
    ({"propagation": "1m30s", "grace": "1h"}, 90 + 3600 + 10),
    ({"propagation": "500ms", "grace": "1.2s"}, 2 + 10),
]


def test_the_kill_comes_after_the_drain() -> None:
    configs = [
        {"drain": drain} if drain is not None else {"reflection": False} for drain, _ in DRAINS
    ]
    answers = rendered(*({"config": yaml.safe_dump(config)} for config in configs))
    for (_, seconds), manifests in zip(DRAINS, answers, strict=True):
        assert pod_of(manifests)["spec"]["terminationGracePeriodSeconds"] == seconds
        scale_down = only(manifests, "HorizontalPodAutoscaler")["spec"]["behavior"]["scaleDown"]
        assert scale_down["policies"][0]["periodSeconds"] == min(seconds, 1800)


def test_without_a_drain_in_the_file_the_chart_reckons_with_the_gateways_own() -> None:
    drain = Config().drain
    (manifests,) = rendered({"config": "{}", "terminationMarginSeconds": 3})
    seconds = pod_of(manifests)["spec"]["terminationGracePeriodSeconds"]
    assert seconds == drain.propagation + drain.grace + 3


# What may stand in a configuration, once more and otherwise.
_SETTINGS: dict[str, tuple[Any, Any]] = {
    "drain": ({"grace": "60s"}, {"grace": "60s", "propagation": "5s"}),
}


def checksum(manifests: dict[str, str]) -> str:
    annotations: dict[str, str] = pod_of(manifests)["metadata"]["annotations"]
    return annotations["checksum/config"]


def test_pods_are_replaced_where_the_configuration_needs_a_restart_and_only_there() -> None:
    split = {path.partition(".")[0] for path in RELOADED if "." in path}
    fields = {field.name: field.type for field in msgspec.structs.fields(Config)}
    paths = []
    no_case = {"warnings", "tls"}  # no setting; and one that wants `health` beside it
    for name in fields.keys() - no_case:
        below = msgspec.structs.fields(fields[name]) if name in split else ()
        paths += [f"{name}.{field.name}" for field in below] or [name]
    assert set(paths) >= RELOADED
    values = [
        {"config": json.dumps({section: {name: value} if name else value})}
        for path in paths
        for section, _, name in [path.partition(".")]
        for value in _SETTINGS.get(path, ({"listen": "a:1"}, {"listen": "a:2"}))
    ]
    answers = [checksum(manifests) for manifests in rendered(*values)]
    pairs = zip(paths, answers[::2], answers[1::2], strict=True)
    kept = {path for path, one, other in pairs if one == other}
    assert kept == RELOADED, "`tokenwire.restarting` in the chart's _helpers.tpl names others"


def test_pods_are_replaced_where_callers_are_no_longer_asked_who_they_are() -> None:
    configs = ("callers: {a: {}}", "callers: {b: {}}", "{}")
    one, other, nobody = (checksum(each) for each in rendered(*({"config": c} for c in configs)))
    assert one == other != nobody


def test_ports_and_protocol_follow_the_configuration() -> None:
    secured = """
        tls: {certificate: /tls/tls.crt, key: /tls/tls.key}
        health: {listen: "0.0.0.0:50054"}
        metrics: {listen: "0.0.0.0:9999"}
    """
    cases = [
        ("{}", 50051, "kubernetes.io/h2c", []),
        (secured, 50054, "https", [9999]),
        ('{metrics: {listen: "off"}, health: {listen: "off"}}', 50051, "kubernetes.io/h2c", []),
        # As the example of every setting has them: nobody outside the pod reaches these.
        (
            '{metrics: {listen: "127.0.0.1:9464"}, health: {listen: "[::1]:50054"}}',
            *(50051, "kubernetes.io/h2c", []),
        ),
        ('{metrics: {listen: "unix:/run/metrics1"}}', 50051, "kubernetes.io/h2c", []),
    ]
    answers = rendered(*({"config": config} for config, *_ in cases))
    for (_, probed, protocol, metrics), manifests in zip(cases, answers, strict=True):
        (container,) = pod_of(manifests)["spec"]["containers"]
        for name in ("startup", "readiness", "liveness"):
            assert container[f"{name}Probe"]["grpc"]["port"] == probed
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert list(ports.values()) == [50051, *metrics]
        services = [one for one in objects(manifests) if one["kind"] == "Service"]
        exposed = [port for service in services for port in service["spec"]["ports"]]
        assert {p["appProtocol"] for p in exposed if p["name"] == "grpc"} == {protocol}
        assert [p["port"] for p in exposed if p["name"] == "metrics"] == metrics
        ingress = only(manifests, "NetworkPolicy")["spec"]["ingress"]
        opened = [port["port"] for rule in ingress for port in rule["ports"]]
        assert opened == list(ports)


CALLED = [
    ("{}", [443]),
    ("upstreams: {a: {base_url: https://a/v1}, b: {base_url: https://b/v1}}", [443]),
    ('upstreams: {a: {base_url: "http://vllm.llm.svc:8000/v1"}}', [8000]),
    (
        'upstreams: {a: {base_url: "http://[fd00::1]:81"}, b: {base_url: "http://[fd00::1]"}}',
        [81, 80],
    ),
    ('upstreams: {a: {base_url: "https://a", proxy: "http://proxy:3128"}}', [443, 3128]),
    ('{otlp: {endpoint: "http://collector:4317"}}', [4317, 443]),
    ('{redis: {url: "redis://redis"}}', [6379, 443]),
    ('{redis: {url: "rediss://redis:6380/1"}}', [6380, 443]),
    ('{redis: {url: "unix:/run/redis.sock"}}', [443]),
]


def test_the_way_out_is_open_to_what_the_configuration_names() -> None:
    answers = rendered(*({"config": config} for config, _ in CALLED))
    for (config, ports), manifests in zip(CALLED, answers, strict=True):
        dns, called = only(manifests, "NetworkPolicy")["spec"]["egress"]
        assert [port["port"] for port in dns["ports"]] == [53, 53]
        assert [port["port"] for port in called["ports"]] == ports, config
        cloud = [to["ipBlock"].get("except") for to in called["to"] if "ipBlock" in to]
        assert cloud == [["169.254.169.254/32"], ["fd00:ec2::254/128"]]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"replica": 2}, "replica"),
    ({"port": "grpc"}, "port"),
    ({"config": {"upstreams": {}}}, "config"),
    ({"image": {"digest": "latest"}}, "digest"),
    ({"secretMounts": [{"secret": "s", "path": "relative"}]}, "path"),
    ({"config": "drain: {grace: forever}"}, "config.drain: got forever"),
    ({"config": "drain: ["}, "config: not YAML"),
    ({"config": "tls: {certificate: a, key: b}"}, "config: with tls it needs health"),
    (
        {"config": "{tls: {certificate: a, key: b}, health: {listen: 'localhost:50054'}}"},
        "config: with tls it needs health",
    ),
    ({"config": "{}", "monitoring": {"enabled": True}}, "monitoring.enabled: config opens no"),
    ({"autoscaling": {"cpuPerPod": ""}}, "neither cpuPerPod nor inFlight"),
]


def test_a_wrong_value_is_refused_and_named() -> None:
    for (values, told), answer in zip(WRONG, answered(*(v for v, _ in WRONG)), strict=True):
        assert told in answer["error"], values


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path, value


# Where a value of its kind will not do.
OTHERS: dict[str, Any] = {
    "image.digest": "sha256:" + "a" * 64,
    "image.pullPolicy": "Always",
    "autoscaling.cpuPerPod": "800m",
    "image.pullSecrets": ["x"],
    "envFromSecrets": ["x"],
    "env": [{"name": "X", "value": "1"}],
    "config": 'metrics: {listen: "0.0.0.0:9465"}',
    "monitoring.interval": "16s",
    "networkPolicy.egress": [{"to": [{"podSelector": {}}]}],
    "networkPolicy.except": ["10.0.0.0/8"],
    "networkPolicy.collectors": [{"podSelector": {}}],
    "grpcRoute.parentRefs": [{"name": "other"}],
    "grpcRoute.hostnames": ["x"],
    "tolerations": [{"key": "x"}],
    "topologyKeys": ["x"],
    "secretMounts": [{"secret": "x", "path": "/x"}],
    "podDisruptionBudget.maxUnavailable": "50%",
}


def another(path: str, value: Any) -> Any:
    """A value of the same kind that is not the same."""
    if path in OTHERS:
        return OTHERS[path]
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return value + "x"
        case list():
            return []
        case dict() if not value:
            return {"k": "v"}
    raise AssertionError(f"{path} needs a row in OTHERS")


def test_every_value_makes_a_difference() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    on = copy.deepcopy(defaults)
    for section in ("monitoring", "grpcRoute"):
        on[section]["enabled"] = True
    on["autoscaling"]["inFlight"]["enabled"] = True
    fixed = copy.deepcopy(on)
    fixed["autoscaling"]["enabled"] = False  # only then `replicas` speaks
    paths, changed = [], []
    for path, _ in leaves(defaults):
        values = copy.deepcopy(fixed if path == ("replicas",) else on)
        at = values
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = another(".".join(path), at[path[-1]])
        paths.append(".".join(path))
        changed.append(values)
    before, before_fixed, *after = rendered(on, fixed, *changed)
    without = [
        path
        for path, manifests in zip(paths, after, strict=True)
        if manifests == (before_fixed if path == "replicas" else before)
    ]
    assert without == []
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"].keys() - {"global"} == defaults.keys()


def test_the_page_shows_the_route_that_the_chart_makes() -> None:
    page = (ROOT / "docs/kubernetes.md").read_text()
    (shown,) = [
        yaml.safe_load(block)
        for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
        if "GRPCRoute" in block
    ]
    (manifests,) = rendered({"grpcRoute": {"enabled": True, "hostnames": ["llm.example.com"]}})
    route = only(manifests, "GRPCRoute")
    for match in route["spec"]["rules"][0]["matches"]:
        assert match["method"].pop("type") == "Exact"  # the default
    del route["metadata"]["labels"]
    assert shown == route


def test_the_page_tells_of_every_value() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    page = (ROOT / "docs/kubernetes.md").read_text()
    assert [name for name in defaults if f"`{name}" not in page] == []


# --- the gateway takes what it is given -------------------------------------------------


def summary(config: str, folder: Path) -> tuple[int, str]:
    """What `tokenwire check-config` says, with files in place of mounted Secrets."""
    for name in ("keys/openai", "keys/local", "callers/search", "callers/billing"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"sk-test-{path.name}\n")
    leaf = trustme.CA().issue_cert("localhost")
    (folder / "tls").mkdir()
    leaf.private_key_pem.write_to_path(folder / "tls/tls.key")
    leaf.cert_chain_pems[0].write_to_path(folder / "tls/tls.crt")
    path = folder / "tokenwire.yaml"
    path.write_text(config.replace("/etc/tokenwire", str(folder)))
    said = io.StringIO()
    variables = {"VLLM_API_KEY": "sk-test-vllm", "REDIS_PASSWORD": "secret"}
    return check(path, variables, said), said.getvalue()


def test_the_configuration_passes_check_config(every: list[dict[str, str]], tmp_path: Path) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    data = only(every[0], "ConfigMap")["data"]
    assert data.keys() == {"tokenwire.yaml"}
    assert data["tokenwire.yaml"].strip() == values["config"].strip()
    code, said = summary(data["tokenwire.yaml"], tmp_path)
    assert code == 0, said
    (container,) = pod_of(every[0])["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert variables["TOKENWIRE_CONFIG"] == f"{mounts['config']}/tokenwire.yaml"
    assert mounts["secret-0"] == values["secretMounts"][0]["path"]


def test_the_examples_configurations_pass_check_config(tmp_path: Path) -> None:
    example = (ROOT / "deploy/kustomize/example/tokenwire.yaml").read_text()
    for number, text in enumerate((example, PRODUCTION["config"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        code, said = summary(text, folder)
        assert code == 0, said
        assert "warning" not in said


# --- kustomize --------------------------------------------------------------------------


def test_the_base_and_its_components_are_what_make_manifests_writes(tmp_path: Path) -> None:
    run(tool("python"), ROOT / "deploy/manifests.py", tmp_path)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == sorted({path.name for path in KUSTOMIZE.iterdir()} - {"example"})
    for name in folders:
        compared = filecmp.dircmp(tmp_path / name, KUSTOMIZE / name)
        differing = (compared.left_only, compared.right_only, compared.diff_files)
        assert differing == ([], [], []), "run 'make manifests' and commit it"


def kustomized(folder: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(run(built("kustomize"), "build", folder)))


EXAMPLE = (KUSTOMIZE / "example/tokenwire.yaml").read_text()


def test_the_example_of_an_overlay_builds() -> None:
    found = kustomized(KUSTOMIZE / "example")
    (deployment,) = [one for one in found if one["kind"] == "Deployment"]
    (config,) = [one for one in found if one["kind"] == "ConfigMap"]
    assert {one["metadata"]["namespace"] for one in found} == {"llm"}
    (scaler,) = [one for one in found if one["kind"] == "HorizontalPodAutoscaler"]
    assert scaler["spec"]["minReplicas"] == 5
    spec = deployment["spec"]["template"]["spec"]
    assert spec["containers"][0]["image"] == "registry.example.com/tokenwire:0.1.0"
    (used,) = [volume["configMap"] for volume in spec["volumes"] if "configMap" in volume]
    assert used["name"] == config["metadata"]["name"] != "tokenwire"  # a new file, a new name
    assert config["data"]["tokenwire.yaml"] == EXAMPLE
    assert "helm.sh/chart" not in json.dumps(found)


def test_the_examples_configuration_fits_what_the_base_has_of_the_charts() -> None:
    """Of its own configuration the chart reads ports and times; an overlay's is not read."""
    values = {
        "config": EXAMPLE,
        "image": {"repository": "registry.example.com/tokenwire", "tag": "0.1.0"},
        "autoscaling": {"minReplicas": 5},
    }

    def specs(found: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
        specs = {(one["kind"], one["metadata"]["name"]): one.get("spec") for one in found}
        pod = specs["Deployment", "tokenwire"]["template"]
        pod["metadata"]["annotations"].pop("checksum/config", None)
        for volume in pod["spec"]["volumes"]:
            volume.pop("configMap", None)  # whose name differs
        return {name: spec for name, spec in specs.items() if name[0] != "ConfigMap"}

    (manifests,) = rendered(values)
    assert specs(kustomized(KUSTOMIZE / "example")) == specs(objects(manifests))


def test_an_overlay_can_have_what_the_chart_switches_on(tmp_path: Path) -> None:
    shutil.copytree(KUSTOMIZE, tmp_path / "kustomize")
    overlay = tmp_path / "kustomize/example/kustomization.yaml"
    text = overlay.read_text()
    overlay.write_text(text.replace("# components:", "components:"))
    found = {one["kind"]: one for one in kustomized(overlay.parent)}
    assert found.keys() >= FOREIGN
    (manifests,) = rendered({"monitoring": {"enabled": True}, "grpcRoute": {"enabled": True}})
    for kind in FOREIGN:
        assert found[kind]["spec"] == only(manifests, kind)["spec"]
        assert found[kind]["metadata"]["namespace"] == "llm"

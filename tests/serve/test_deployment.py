"""The page on deployment is true: its commands run, its units, manifests and metrics fit the programs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava.engine import Engine
from llava.serve import controller, gradio_web_server, model_worker, openai_worker, register_worker
from llava.serve.common.arguments import API_KEYS_VARIABLE, LOGINS_VARIABLE, TOKEN_VARIABLE
from llava.serve.common.protocol import ErrorType
from llava.serve.common.security import OPEN_PATHS, bind_host
from llava.serve.worker.local_backend import LoadedModel
from tests.serve.stubs import INFO, MODEL, live_controller, live_worker, until

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "Deployment.md").read_text(encoding="utf-8")
FILES = ROOT / "docs" / "deployment"
UNITS = sorted((FILES / "systemd").iterdir())
PROGRAMS = {"controller": controller, "worker": model_worker, "web": gradio_web_server}
CURL = re.findall(r"^curl .*", PAGE, re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_curl_lines_of_the_page_work() -> None:
    assert len(CURL) >= 4
    with live_controller() as running, live_worker(controller=running.url):
        until(lambda: running.registry.models() == [MODEL])
        for line in CURL:
            words = shlex.split(line.replace("http://localhost:10000", running.url))
            words = [word.replace("InternVL-Chat-ViT-6B-Vicuna-7B", MODEL) for word in words]
            done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
            if "-sN" in words:
                assert done.stdout.endswith("data: [DONE]\n\n")
            elif "completions" in line:
                assert json.loads(done.stdout)["choices"][0]["message"]["content"].startswith("w0")
            else:
                assert MODEL in done.stdout or json.loads(done.stdout)["ready"] is True


@pytest.mark.parametrize(
    ("module", "name"),
    [(controller, "controller"), (openai_worker, "openai_worker"), (register_worker, "register_worker")],
)
def test_every_command_of_the_page_parses(module: object, name: str) -> None:
    found = re.findall(rf"^\s*python -m llava\.serve\.{name} (.*)", PAGE, re.MULTILINE)
    assert found
    for words in found:
        assert module.build_parser().parse_args(shlex.split(words))  # type: ignore[attr-defined]


def test_the_parts_of_the_compose_file_can_be_reached_by_each_other() -> None:
    parts = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name, module in (("controller", controller), ("worker", model_worker), ("web", gradio_web_server)):
        program, *words = parts[name]["command"]
        args = module.build_parser().parse_args(words)
        protected = name != "web"  # LLAVA_TOKEN must be set; logins need not
        assert program == module.__name__
        assert bind_host(args.host, protected=protected, insecure=args.insecure) == "0.0.0.0"
        assert str(args.port) == parts[name]["environment"].get("PORT", "10000")
        assert all(port.startswith("127.0.0.1:") for port in parts[name].get("ports", []))


def test_worker_commands_and_their_short_flags_parse() -> None:
    parser = model_worker.build_parser()
    for words in re.findall(r"python -m llava\.serve\.model_worker (.*)", PAGE):
        args = parser.parse_args(shlex.split(words))
        assert args.controller_address == "http://localhost:10000"
        assert args.limit_model_concurrency == 5
    words = "--worker http://localhost:1 --model-path x --load-4bit --model-base y --device cpu --no-register"
    args = parser.parse_args(shlex.split(words))
    assert (args.worker_address, args.load_4bit, args.no_register) == ("http://localhost:1", True, True)


def parse(words: list[str]) -> Namespace:
    """`[-m] MODULE FLAG…` by the parser of the module."""
    module, *flags = words[words[0] == "-m" :]
    program = next(program for program in PROGRAMS.values() if program.__name__ == module)
    return program.build_parser().parse_args(flags)


def unit(path: Path) -> dict[str, list[str]]:
    """The settings of a unit, each with its values."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_units_start_our_programs_and_outlast_their_grace(path: Path) -> None:
    settings = unit(path)
    (command,), (stop,) = settings["ExecStart"], settings["TimeoutStopSec"]
    args = parse(shlex.split(command.replace("%i", "0").partition(" ")[2]))
    assert int(stop) >= args.grace_seconds + 10  # uvicorn's last five seconds, and the end of the process
    if "worker" in path.stem:
        assert args.worker_address == f"http://localhost:{args.port}" == "http://localhost:40000"
        assert args.model_path == "${MODEL}"
    assert getattr(args, "controller_address", getattr(args, "controller_url", "http://localhost:10000")) == (
        "http://localhost:10000"
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """With this interpreter in place of the one in /srv/llava, whose absence would be an error."""
    for path in UNITS:
        text = path.read_text(encoding="utf-8").replace("/srv/llava/venv/bin/python", sys.executable)
        (tmp_path / path.name.replace("@", "@0")).write_text(text, encoding="utf-8")
    names = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, check=False
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "llava" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """All objects by kind and name."""
    listed = yaml.safe_load((FILES / "kubernetes" / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(path.name for path in (FILES / "kubernetes").iterdir())
    texts = [(FILES / "kubernetes" / name).read_text(encoding="utf-8") for name in listed]
    objects = [each for text in texts for each in yaml.safe_load_all(text)]
    found = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects)
    return found


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_renders_the_manifests() -> None:
    command = ["kubectl", "kustomize", str(FILES / "kubernetes")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    objects = [each for each in yaml.safe_load_all(done.stdout) if each["kind"] != "Namespace"]
    assert {each["metadata"]["namespace"] for each in objects} == {"llava"} and len(objects) == len(manifests()) - 1
    specs = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "Deployment"}
    images = {pod["image"] for spec in specs.values() for pod in spec["template"]["spec"]["containers"]}
    assert images == {"registry.example.org/llava:1.0"} and specs["llava-worker"]["replicas"] == 2


@pytest.mark.parametrize("part", PROGRAMS)
def test_pods_run_our_programs(part: str) -> None:
    """Flags, ports, probes, secrets and shutdown of each Deployment fit the program it starts."""
    objects = manifests()
    spec = objects["Deployment", f"llava-{part}"]["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    (container,) = pod["containers"]
    args = parse(container["args"])
    (port,) = container["ports"]
    variables = {each["name"]: each for each in container["env"]}
    assert spec["selector"]["matchLabels"] == labels and labels["app.kubernetes.io/component"] == part
    assert args.port == port["containerPort"]
    assert bind_host(args.host, protected=True, insecure=False) == "0.0.0.0"
    slept = int(
        container.get("lifecycle", {"preStop": {"exec": {"command": ["sleep", "0"]}}})["preStop"]["exec"]["command"][1]
    )
    assert pod["terminationGracePeriodSeconds"] >= slept + args.grace_seconds + 10
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        target = container[probe]["httpGet"]
        assert target["port"] == port["name"] and target["path"] in OPEN_PATHS
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    keys = {"token": TOKEN_VARIABLE, "api-keys": API_KEYS_VARIABLE, "web-logins": LOGINS_VARIABLE}
    secrets = {name: each["valueFrom"]["secretKeyRef"] for name, each in variables.items() if name in keys.values()}
    assert TOKEN_VARIABLE in secrets
    assert {keys[each["key"]]: "llava" for each in secrets.values()} == {
        name: secrets[name]["name"] for name in secrets
    }
    assert set(objects["Secret", "llava"]["stringData"].items()) == {
        (key, "") for key in keys
    }  # no password by default
    controllers = [getattr(args, name) for name in ("controller_address", "controller_url") if hasattr(args, name)]
    service = objects["Service", "llava-controller"]["spec"]
    assert all(url == f"http://llava-controller:{service['ports'][0]['port']}" for url in controllers)


def test_a_worker_has_one_gpu_and_is_ready_when_its_model_is() -> None:
    objects = manifests()
    spec = objects["Deployment", "llava-worker"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["readinessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/ready"
    args = parse(container["args"])
    assert args.worker_address == f"http://$(POD_IP):{args.port}"
    assert args.model_path.startswith(container["volumeMounts"][0]["mountPath"])
    # The controller cannot wait for a worker, which registers through the controller's Service.
    (other,) = objects["Deployment", "llava-controller"]["spec"]["template"]["spec"]["containers"]
    assert other["readinessProbe"]["httpGet"]["path"] == "/health"


def test_network_policies_allow_what_the_processes_need() -> None:
    objects, allowed = manifests(), set()
    for (kind, _), each in objects.items():
        component = each["spec"]["podSelector"].get("matchLabels", {}) if kind == "NetworkPolicy" else {}
        if component:
            (part,) = component.values()
            for way, peers in (("ingress", "from"), ("egress", "to")):
                for rule in each["spec"].get(way, []):
                    names = [p["podSelector"]["matchLabels"].values() for p in rule[peers] if "podSelector" in p]
                    allowed |= {(way, part, *name) for name in names}
    calls = {("web", "controller"), ("web", "worker"), ("controller", "worker"), ("worker", "controller")}
    assert allowed == {("egress", a, b) for a, b in calls} | {("ingress", b, a) for a, b in calls}


def test_monitoring_uses_metrics_that_exist(engine: Engine) -> None:
    """Every metric, label and outcome in the alerts, the dashboard and the page is exposed by one of the programs."""
    with live_controller() as running, live_worker(load=lambda _: LoadedModel(engine, INFO)) as worker:
        exposed = {"llava-controller": running.controller.metrics, "llava-worker": worker.worker.metrics}
        samples = {
            job: {sample.name: set(sample.labels) for metric in metrics.registry.collect() for sample in metric.samples}
            for job, metrics in exposed.items()
        }
        helps = {metric.name: metric.documentation for metric in worker.worker.metrics.registry.collect()}
    assert all(helps.values())
    empty = {
        "llava_requests_total": {"outcome"},
        "llava_http_total": {"path", "status"},
        "llava_tokens_total": {"kind"},
    }
    rules = yaml.safe_load((FILES / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    dashboard = json.loads((FILES / "grafana.json").read_text(encoding="utf-8"))
    queries = [rule["expr"] for rule in rules] + [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    outcomes = {each.wire for each in ErrorType}
    assert len(rules) == 7 and len(dashboard["panels"]) == 12
    for query in queries:
        selected = re.findall(r"(\w+)\{([^}]*)\}", query)
        assert len(selected) == len(re.findall(r"\b(?:llava_\w+|up)\b", query)) > 0, query
        for name, selector in selected:
            (job,) = re.findall(r'job=~?"([^"]+)"', selector)
            assert name == "up" or name in {**samples[job], **empty}, query
            found = re.findall(r'outcome=~?"([^"]+)"', selector)
            assert {word for each in found for word in each.split("|")} <= outcomes, query
        labels = [each.get(name, set()) for each in (*samples.values(), empty) for name, _ in selected]
        assert set(re.findall(r"by \((\w+)\)", query)) <= set().union(*labels), query
    for name in re.findall(r"`(llava_\w+)`", PAGE.split("## Monitoring")[1]):
        assert any(sample.startswith(name) for each in (*samples.values(), empty) for sample in each), name
    scraped = yaml.safe_load((FILES / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert [each["job_name"] for each in scraped] == ["llava-controller", "llava-worker", "llava-web"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_its_configuration() -> None:
    subprocess.run(["promtool", "check", "rules", str(FILES / "alerts.yml")], check=True)
    subprocess.run(["promtool", "check", "config", "--syntax-only", str(FILES / "prometheus.yml")], check=True)

"""deploy/monitoring before a real Prometheus that has read a gateway at work: every expression of
the rules and of the dashboard finds data, and what is wrong with that gateway is told."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from harness import failing, receive, request, simulate, stream_request
from processes import Program, serve, write_config
from tokenwire.v1 import error_reason_pb2, model_service_pb2, model_service_pb2_grpc
from tokenwire_service.errors import Fault
from tokenwire_service.simulator import Simulator
from tokenwire_service.snapshot import Scope, State
from tokenwire_service.telemetry import SPANS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in PANELS
    for target in panel["targets"]
}
TOKEN = (("authorization", "Bearer token-of-search"),)


def filled_in(expression: str) -> str:
    """As Grafana sends it."""
    for name, value in (("$__rate_interval", "1m"), ("$job", ".+"), ("$instance", ".*")):
        expression = expression.replace(name, value)
    return expression.replace("$upstream", ".*")


# In place of a threshold: whether it is passed. So a rule that is content still answers, if what
# it looks at is there.
def without_thresholds(expression: str) -> str:
    compared = re.sub(r" (==|>=?|<=?) (?=\d)", r" \1 bool ", expression)
    # Nor what this gateway, which has no defects, did not meet: another test reads these.
    return re.sub(r'(?:code|reason|outcome|scope)=~?"[^"]*",?', "", compared)


@dataclass
class Watched:
    """What Prometheus said. `answers`: expression -> series."""

    answers: dict[str, list[Any]]
    rules: dict[str, dict[str, Any]]
    pending: set[tuple[str, str]]  # alert, key
    page: str


@pytest.fixture(scope="module")
def watched(prometheus: str, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return asyncio.run(watch(prometheus, tmp_path_factory.mktemp("monitoring")))


async def watch(prometheus: str, folder: Path) -> Watched:
    async with Simulator(tokens_per_second=0).serving() as url, gateway_before(url, folder) as run:
        serving = run.event("serving")
        assert serving is not None
        metrics = serving["metrics"]
        async with watching(prometheus, folder, metrics) as prom:
            for _ in range(3):
                await work(run)
                seen = await scrapes(prom)
                await until_scraped(prom, seen + 2)
            answers = {
                expression: (await ask(prom, "query", query=expression))["result"]
                for expression in (
                    *map(filled_in, EXPRESSIONS.values()),
                    *(without_thresholds(rule["expr"]) for rule in RULES),
                )
            }
            groups = (await ask(prom, "rules"))["groups"]
            alerts = (await ask(prom, "alerts"))["alerts"]
        async with aiohttp.ClientSession() as session:
            page = await (await session.get(f"http://{metrics}/metrics")).text()
    return Watched(
        answers,
        {rule["name"]: rule for group in groups for rule in group["rules"]},
        {(a["labels"]["alertname"], a["labels"].get("key", "")) for a in alerts},
        page,
    )


@asynccontextmanager
async def gateway_before(url: str, folder: Path) -> AsyncIterator[Program]:
    config = write_config(
        folder,
        url,
        admin={"listen": "off"},
        metrics={"listen": "127.0.0.1:0"},
        retries={"max_attempts": 2, "backoff": "1ms", "backoff_cap": "1ms"},
        callers={"search": {"tokens": [{"env": "SEARCH_TOKEN"}]}},
    )
    keys = ",".join(f"sk-test-number-{n}" for n in range(1, 5))
    async with serve("--config", config, TEST_KEY=keys, SEARCH_TOKEN="token-of-search") as started:
        yield started


async def work(gateway: Program) -> None:
    """Answers, a rate limit, a rejected key, a retry, a refusal, a stranger."""

    async def ask(**directives: Any) -> None:
        asked = stream_request(request(extra_body_json=simulate(**directives)))
        await receive(gateway.chat.StreamChat(asked, metadata=TOKEN))

    for _ in range(4):  # in a row, so that every key meets it: they take turns
        await ask(fault="invalid_api_key", keys=["er-2"])
    for _ in range(4):
        await ask(fault="rate_limited", keys=["er-1"], retry_after_s=100)
    for _ in range(5):
        await ask(tokens=20, tokens_per_second=500, first_token_ms=5)
    for _ in range(3):
        await ask(fault="server_error")
    await ask(fault="refused")
    await failing(gateway.chat.Chat(request()))
    models = model_service_pb2_grpc.ModelServiceStub(gateway.channel)
    await models.ListModels(model_service_pb2.ListModelsRequest(), metadata=TOKEN)


@asynccontextmanager
async def watching(prometheus: str, folder: Path, target: str) -> AsyncIterator[str]:
    """Prometheus with what deploy/monitoring has, but in a hurry; its URL."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "250ms", "evaluation_interval": "250ms"}
    config["rule_files"] = [str(FOLDER / "rules.yaml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            prometheus,
            f"--config.file={folder}/prometheus.yaml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={listen}",
            stdout=log,
            stderr=log,
        )
        try:
            async with asyncio.timeout(30):
                while await scrapes(f"http://{listen}") == 0:
                    assert process.returncode is None, (folder / "prometheus.log").read_text()
                    await asyncio.sleep(0.1)
            yield f"http://{listen}"
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def scrapes(prom: str) -> int:
    """How often the gateway was read so far."""
    try:
        counted = await ask(prom, "query", query='sum(count_over_time(up{job="tokenwire"}[5m]))')
    except aiohttp.ClientError:
        return 0
    return int(counted["result"][0]["value"][1]) if counted["result"] else 0


async def until_scraped(prom: str, times: int) -> None:
    async with asyncio.timeout(30):
        while await scrapes(prom) < times:
            await asyncio.sleep(0.1)


async def ask(prom: str, what: str, **params: str) -> Any:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{prom}/api/v1/{what}", params=params) as answer,
    ):
        told = await answer.json(content_type=None) if answer.status != 503 else {}
        if answer.status == 503:  # it has not begun yet
            raise aiohttp.ClientConnectionError
        assert told["status"] == "success", (told, params)
        return told["data"]


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_every_plot_has_something_to_draw(watched: Watched, title: str) -> None:
    assert watched.answers[filled_in(EXPRESSIONS[title])], EXPRESSIONS[title]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_rule_has_something_to_judge(watched: Watched, rule: dict[str, Any]) -> None:
    assert watched.answers[without_thresholds(rule["expr"])], rule["expr"]
    assert watched.rules[rule["alert"]]["health"] == "ok"


def test_what_is_wrong_with_this_gateway_is_told(watched: Watched) -> None:
    alerts = {alert for alert, _ in watched.pending}
    assert alerts == {"TokenwireKeyRetired", "TokenwireErrors", "TokenwireUpstreamFailing"}
    [key] = {key for alert, key in watched.pending if alert == "TokenwireKeyRetired"}
    assert f'tokenwire_key_state{{key="{key}",state="retired",upstream="test"}} 1.0' in watched.page


def test_promtool_finds_no_fault_with_the_metrics(watched: Watched, promtool: str) -> None:
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=watched.page, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_promtool_finds_no_fault_with_rules_and_scrape_configuration(promtool: str) -> None:
    for what in (("check", "config", "prometheus.yaml"), ("check", "rules", "rules.yaml")):
        checked = subprocess.run(
            [promtool, *what], cwd=FOLDER, capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


TABLES = {
    "outcome": {"ok", "abandoned", *SPANS, *(fault.value for fault in Fault)},
    "state": {state.value for state in State},
    "scope": {scope.value for scope in Scope},
    "reason": {
        name.removeprefix("ERROR_REASON_")
        for name in error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name
    },
    "code": {"INTERNAL"},
    "type": {"prompt", "completion"},
}


@pytest.mark.parametrize("expression", [*EXPRESSIONS.values(), *(r["expr"] for r in RULES)])
def test_no_expression_asks_for_a_value_that_no_table_has(expression: str) -> None:
    for label, values in re.findall(r'\b(\w+)=~?"([^"$]+)"', expression):
        for value in values.split("|") if label in TABLES else ():
            assert any(re.fullmatch(value, each) for each in TABLES[label]), value


def test_the_panels_lie_side_by_side_and_have_names() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        area = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & area, panel["title"]
        assert max(x for x, _ in area) < 24
        taken |= area
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(
        panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS
    )

"""What attempts are called in OpenTelemetry's words, whatever the configuration."""

from __future__ import annotations

import io
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

from tokenwire_service.config import Config, Model, Upstream
from tokenwire_service.labels import OTHER, Labels
from tokenwire_service.otlp import Meter, Tracer, provider
from tokenwire_service.providers import DIALECTS, PROFILES
from tokenwire_service.telemetry import AttemptEvent, configure_logging, log_scrubber
from tokenwire_service.upstream.dialect import Route

# `gen_ai.provider.name` as the conventions list them; others are our own words.
WELL_KNOWN = {
    "openai": "openai",
    "openai-reasoning": "openai",
    "openai-hybrid": "openai",
    "compatible": "openai",
    "azure": "azure.ai.openai",
    "azure-reasoning": "azure.ai.openai",
    "azure-hybrid": "azure.ai.openai",
    "deepseek": "deepseek",
    "groq": "groq",
    "mistral": "mistral_ai",
    "xai": "x_ai",
    "anthropic": "anthropic",
    "gemini": "gcp.gemini",
}


def upstream(name: str = "u", base_url: str = "https://host.test/v1", **fields: Any) -> Upstream:
    return Upstream(name=name, base_url=base_url, keys=(), **fields)


def attempt(name: str = "u", model: str = "m", fault: str = "", **fields: Any) -> AttemptEvent:
    return AttemptEvent("r", name, model, "k", 200, fault, "", 0.5, **fields)


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "auto"])
def test_every_profile_is_a_provider(profile: str) -> None:
    route = Route(upstream(profile=profile), None, "m")
    found = provider(route)
    assert found == WELL_KNOWN.get(profile, found)
    assert found


@pytest.mark.parametrize("dialect", ["anthropic", "gemini", "dashscope"])
def test_a_dialect_without_profiles_is_one(dialect: str) -> None:
    assert DIALECTS[dialect].profile == ""
    found = provider(Route(upstream(dialect=dialect), None, "m"))
    assert found == WELL_KNOWN.get(dialect, dialect)


def points(reader: InMemoryMetricReader, metric: str) -> list[dict[str, Any]]:
    data = reader.get_metrics_data()
    assert data is not None
    return [
        dict(point.attributes or {})
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for each in scope.metrics
        if each.name == metric
        for point in each.data.data_points
    ]


def test_attributes_follow_the_configuration_in_force() -> None:
    model = Model(name="mine", upstream="u", upstream_model="m", dialect="anthropic")
    labels = Labels(Config(upstreams=(upstream(),), models=(model,)), log_scrubber())
    reader = InMemoryMetricReader()
    meter = Meter(MeterProvider((reader,), shutdown_on_exit=False), labels)
    meter.attempt(attempt())
    meter.attempt(attempt(model="invented", fault="refused"))
    moved = upstream(base_url="http://other.test:8080/v1", profile="groq")
    labels.take(Config(upstreams=(moved, upstream("new"))))
    meter.attempt(attempt(prompt_tokens=3, completion_tokens=2))
    meter.attempt(attempt("new", ""))
    meter.attempt(attempt("gone"))  # its upstream has left while it ran
    all_of_them = points(reader, "gen_ai.client.operation.duration")
    [moved_to] = [each for each in all_of_them if each.get("server.port") == 8080]
    assert moved_to["gen_ai.provider.name"] == "groq"
    assert moved_to["gen_ai.request.model"] == "m"
    assert moved_to["server.address"] == "other.test"
    [gone] = [each for each in all_of_them if "server.address" not in each]
    assert gone["gen_ai.operation.name"] == "chat"
    assert {each.get("gen_ai.provider.name") for each in all_of_them} == {
        "anthropic",
        "openai",
        "groq",
        None,
    }
    [refused] = [each for each in all_of_them if "error.type" in each]
    assert refused["error.type"] == "refused"
    assert refused["gen_ai.request.model"] == OTHER
    [listed] = [each for each in all_of_them if each["gen_ai.operation.name"] == "list_models"]
    assert "gen_ai.request.model" not in listed


@pytest.mark.parametrize("state", ["no member, a=1,a=2,=,", "a" * 600])
def test_no_caller_fills_the_log_by_its_trace(state: str) -> None:
    log = io.StringIO()
    configure_logging("info", as_json=True, stream=log)
    tracer = Tracer(TracerProvider(shutdown_on_exit=False), True, log_scrubber())
    for parent in (f"00-{'1' * 32}-{'2' * 16}-01", "0" * 600):
        tracer.call("a/b", (("traceparent", parent), ("tracestate", state)))
    assert log.getvalue() == ""

"""The dialect of Azure OpenAI: chat completions below a deployment, and a key of its own header."""

from __future__ import annotations

from collections.abc import Mapping

from tokenwire_service.config import Key, Upstream
from tokenwire_service.upstream.dialect import Encoded, Route, path_segment
from tokenwire_service.upstream.openai import OpenAI


class Azure(OpenAI):
    """The dialect. A base URL that ends in /openai/v1 is the versionless form, whose paths are
    OpenAI's and whose model is the deployment's name; any other is the resource's endpoint."""

    def path(self, route: Route) -> str:
        """Where requests go: the model's name is that of the deployment."""
        version = route.upstream.api_version
        query = f"?api-version={version}" if version else ""
        if _is_versionless(route.upstream):
            return f"/chat/completions{query}"
        root = "" if route.upstream.base_url.endswith("/openai") else "/openai"
        return f"{root}/deployments/{path_segment(route.model_name)}/chat/completions{query}"

    def headers(self, key: Key, organization: str | None) -> Mapping[str, str]:
        """Azure's own header. It knows no organizations: the resource is the account."""
        return {"api-key": key.secret.reveal()}

    def list_models(self, upstream: Upstream) -> Encoded | None:
        """None: Azure lists the models that could be deployed, not the deployments that can be
        called."""
        return None


def _is_versionless(upstream: Upstream) -> bool:
    return upstream.base_url.endswith("/openai/v1")

"""A configuration whose upstream is the simulator, run inside this process."""

from __future__ import annotations

from contextlib import AsyncExitStack

import msgspec

from tokenwire_service.config import Config, Key, Model, Upstream
from tokenwire_service.secret import Secret
from tokenwire_service.simulator import Simulator


async def with_simulator(config: Config, stack: AsyncExitStack) -> Config:
    """`config` with one upstream more: the simulator, which runs until `stack` is left.

    It takes every model name, unless another upstream does already; then `simulated` leads to it.
    """
    base_url = await stack.enter_async_context(Simulator().serving())
    keys = tuple(
        Key(id=name, secret=Secret(f"sk-{name}")) for name in ("simulated-a", "simulated-b")
    )
    others = config.upstreams
    simulator = Upstream(
        name="simulator",
        base_url=base_url,
        keys=keys,
        passthrough=not any(upstream.passthrough for upstream in others),
    )
    models = config.models
    if not simulator.passthrough:
        models = (*models, Model(name="simulated", upstream=simulator.name))
    return msgspec.structs.replace(config, upstreams=(*others, simulator), models=models)

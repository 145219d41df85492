"""The asyncio client under the name `tokenwire.aio.Client`."""

from tokenwire.client import AsyncBatch as Batch
from tokenwire.client import AsyncClient as Client
from tokenwire.client import AsyncStream as Stream

__all__ = ["Batch", "Client", "Stream"]

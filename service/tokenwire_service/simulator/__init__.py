"""An OpenAI-compatible HTTP upstream for demos and tests: a program beside the gateway."""

from tokenwire_service.simulator.app import Simulator, Stats, run
from tokenwire_service.simulator.faults import Fault

__all__ = ["Fault", "Simulator", "Stats", "run"]

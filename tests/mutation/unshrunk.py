"""A pytest plugin for mutants: that a property fails is enough, by which example is not asked.

To find the smallest one takes Hypothesis minutes, for each mutant.
"""

from __future__ import annotations

from hypothesis import Phase, settings

settings.register_profile("unshrunk", phases=(Phase.explicit, Phase.reuse, Phase.generate))
settings.load_profile("unshrunk")

"""Property tests have no limit on time, which a busy machine would break."""

from hypothesis import settings

settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

"""For all unit tests."""

from hypothesis import settings

# a machine that others use too takes now and then ten times as long over an example
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

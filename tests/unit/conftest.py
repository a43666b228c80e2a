"""For all unit tests."""

import os
import tempfile

from hypothesis import settings

# a machine that others use too takes now and then ten times as long over an example
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="oneshot-cache-")  # the user's own is left alone

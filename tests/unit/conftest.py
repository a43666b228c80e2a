"""For all unit tests."""

import os
import tempfile

from collecting import pytest_collection_finish  # noqa: F401
from hypothesis import settings

# a machine that others use too takes now and then ten times as long over an example
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="oneshot-cache-")  # the user's own is left alone
# No test speaks TLS, but every client reads the machine's certificates, for 30 ms; a folder is read when one is needed.
os.environ["SSL_CERT_DIR"] = tempfile.mkdtemp(prefix="oneshot-no-certificates-")
os.environ.pop("SSL_CERT_FILE", None)

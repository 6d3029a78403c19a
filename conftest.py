"""Before any test file imports the hub's libraries: no network, and a cache of its own."""

import os
import tempfile

CACHE = tempfile.TemporaryDirectory()  # nothing is read from the user's cache or left in it
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=CACHE.name)

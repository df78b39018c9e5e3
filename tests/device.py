"""Where engines under test run: `FATHOM_TEST_DEVICE=cuda pytest tests/parity` asks a GPU the same."""

import os

DEVICE = os.environ.get("FATHOM_TEST_DEVICE", "cpu")

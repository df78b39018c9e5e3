"""Keys and usage on both databases, and a keyring over what a test says."""

from tests.boundary.conftest import second_url as second_url
from tests.boundary.conftest import store_url as store_url

"""The database under the store: which one a URL means, how it is opened, and when a write begins."""


class StoreError(Exception):
    """The store cannot do what was asked, in one line that never shows a password."""

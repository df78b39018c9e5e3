"""What alembic runs to migrate the connection it is given by `database.py`, in its transaction."""

from alembic import context

from boundary.store.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()

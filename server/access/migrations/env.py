"""What alembic runs to migrate the server's own tables on the connection that it is given."""

from alembic import context

from server.access.tables import VERSION_TABLE, Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
)
context.run_migrations()

"""Which batches of usage are in the database, so that one whose commit nobody heard of counts once."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """From a database that cannot tell."""
    op.create_table(
        "usage_writers",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("batch", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_usage_writers"),
    )

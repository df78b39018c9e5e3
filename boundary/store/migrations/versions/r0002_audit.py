"""The audit trail says how a thing ended and which request asked for it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """What was written before had been done: only that was written."""
    if op.get_bind().dialect.name != "sqlite":
        op.add_column("audit", sa.Column("outcome", sa.Text, nullable=False, server_default="ok"))
        op.add_column("audit", sa.Column("request_id", sa.Text))
        return
    # SQLite would put the columns behind the table's constraints: its own words for the table should
    # be those of a database that was made new.
    op.rename_table("audit", "audit_before")
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False, server_default="ok"),
        sa.Column("request_id", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.execute(
        "INSERT INTO audit (id, at, actor, action, subject, details)"
        " SELECT id, at, actor, action, subject, details FROM audit_before"
    )
    op.drop_table("audit_before")

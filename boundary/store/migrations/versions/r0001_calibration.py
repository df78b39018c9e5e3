"""The first tables: boundaries, activations, jobs and audit.

A revision is written by hand, is never edited once released and leads forward only: whoever wants
an older database restores a backup of it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """From an empty database."""
    op.create_table(
        "boundaries",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("depth", sa.Integer, nullable=False),
        sa.Column("record", sa.JSON, nullable=False),
        sa.Column("evidence", sa.JSON, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_boundaries"),
        sa.UniqueConstraint(
            "base", "adapter", "version", name="uq_boundaries_base_adapter_version"
        ),
    )
    op.create_table(
        "activations",
        sa.Column("sequence", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_activations"),
        sa.ForeignKeyConstraint(
            ["base", "adapter", "version"],
            ["boundaries.base", "boundaries.adapter", "boundaries.version"],
            name="fk_activations_base_adapter_version",
        ),
        sa.CheckConstraint(
            "(version IS NULL) = (action = 'deactivate')",
            name=op.f("ck_activations_version_unless_deactivated"),
        ),
    )
    op.create_index(
        "ix_activations_base_adapter_sequence", "activations", ["base", "adapter", "sequence"]
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("adapter_name", sa.Text, nullable=False),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("stage", sa.Text),
        sa.Column("done", sa.BigInteger, nullable=False),
        sa.Column("total", sa.BigInteger, nullable=False),
        sa.Column("boundary_id", sa.Text),
        sa.Column("result", sa.JSON),
        sa.Column("error", sa.Text),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("is_cancel_requested", sa.Boolean, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("started_at", TIME),
        sa.Column("finished_at", TIME),
        sa.Column("heartbeat_at", TIME, nullable=False),
        sa.Column("lease_ends_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled', 'interrupted')",
            name=op.f("ck_jobs_state"),
        ),
        sa.ForeignKeyConstraint(["boundary_id"], ["boundaries.id"], name="fk_jobs_boundary_id"),
    )
    op.create_index("ix_jobs_created_at", "jobs", ["created_at"])
    unfinished = sa.text("state IN ('queued', 'running')")
    op.create_index(
        "uq_jobs_unfinished",
        "jobs",
        ["base", "adapter"],
        unique=True,
        sqlite_where=unfinished,
        postgresql_where=unfinished,
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )

"""Scheduled and paused rounds."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("federations", sa.Column("every_s", sa.Float(), nullable=True))
    op.add_column("federations", sa.Column("rounds_left", sa.Integer(), nullable=True))
    op.add_column("federations", sa.Column("next_round_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("federations", sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(op.f("ix_federations_next_round_at"), "federations", ["next_round_at"])


def downgrade() -> None:
    op.drop_index(op.f("ix_federations_next_round_at"), "federations")
    for column in ("paused_at", "next_round_at", "rounds_left", "every_s"):
        op.drop_column("federations", column)

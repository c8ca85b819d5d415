"""Pictures: a revision of their own, so that they do not travel with every small write of their user.

Revision: 0005, after 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # NULL in the rows that are there: each of them is brought once more before it is left out.
    op.add_column("user_pictures", sa.Column("cf_rev", sa.BigInteger))
    op.add_column("user_pictures", sa.Column("cf_digest", sa.LargeBinary))


def downgrade() -> None:
    op.drop_column("user_pictures", "cf_digest")
    op.drop_column("user_pictures", "cf_rev")

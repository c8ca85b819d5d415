"""Where the service's tables are declared together, and whether PostgreSQL has them.

Alembic owns the tables (``migrations/``). `HEAD` is the revision that this code needs; a test holds it equal
to Alembic's own head, so that an installed package can check without the migration scripts.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import MetaData

HEAD: Final = "0006"

#: One naming rule for constraints: an error from PostgreSQL then names table and column by itself.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

"""An entity: how one kind of record is laid out in PostgreSQL, declared once and used both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, Table, Text, Uuid
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

from crossfade.values import Document, id_to_text

META_COLUMNS: Final = ("cf_rev", "cf_op", "cf_digest", "cf_mapping")


class MappingError(Exception):
    """An entity that is declared wrongly; the message names entity, field and fix."""


class DocumentId(TypeDecorator[str]):
    """A column that holds an id as text."""

    impl = Text
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(collation="C")

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        """A str is id text already; any other id is turned into its text."""
        return value if value is None or type(value) is str else id_to_text(value)


def record_columns() -> list[Column[Any]]:
    """The columns that every parent table has besides its own `id` and the mapped ones."""
    return [
        Column("extra", JSONB),
        Column("cf_rev", BigInteger, nullable=False),
        Column("cf_op", Uuid),
        Column("cf_digest", LargeBinary, nullable=False),
        Column("cf_mapping", Integer, nullable=False),
        Column("cf_shape", JSONB),
    ]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that stand for one document."""

    parent: tuple[Any, ...]
    children: tuple[tuple[tuple[Any, ...], ...], ...]


class Field: ...


class Rule: ...


class Child:
    table: Table
    columns: tuple[str, ...]
    field: str


def column(field: str, **kw: Any) -> Field:
    raise NotImplementedError


def normalised(field: str, **kw: Any) -> Rule:
    raise NotImplementedError


def list_child(field: str, **kw: Any) -> Child:
    raise NotImplementedError


def single_child(field: str, **kw: Any) -> Child:
    raise NotImplementedError


class Entity:
    """A kind of record with its mapping."""

    parent_columns: tuple[str, ...]
    children: tuple[Child, ...]

    def __init__(
        self,
        name: str,
        *,
        collection: str,
        table: Table,
        columns: Sequence[Field],
        children: Sequence[Child] = (),
        unique: Sequence[Rule] = (),
        order: Sequence[str] | None = None,
        mapping_version: int = 1,
    ) -> None:
        raise NotImplementedError

    def to_rows(self, document: Mapping[str, Any], keys: Mapping[str, str] | None = None) -> Rows:
        raise NotImplementedError

    def from_rows(self, parent: Sequence[Any], children: Sequence[Sequence[Sequence[Any]]]) -> Document:
        raise NotImplementedError

    def keys(self, document: Mapping[str, Any]) -> dict[str, str]:
        raise NotImplementedError


__all__ = ["Callable"]

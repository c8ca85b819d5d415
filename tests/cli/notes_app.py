"""A small application: notes with a unique title. What `--app notes_app:notes` finds."""

from __future__ import annotations

from sqlalchemy import Column, Integer, MetaData, Table, Text, UniqueConstraint

from crossfade import DocumentId, Entity, column, normalised, record_columns

metadata = MetaData()
note_table = Table(
    "notes",
    metadata,
    Column("id", DocumentId, primary_key=True),
    Column("title", Text, nullable=False),
    Column("title_norm", Text),
    Column("stars", Integer),
    *record_columns(),
    UniqueConstraint("title_norm", name="notes_title_norm_key", deferrable=True, initially="IMMEDIATE"),
)


def notes() -> list[Entity]:
    return [
        Entity(
            "notes",
            collection="notes",
            table=note_table,
            columns=[column("title", required=True), column("stars")],
            unique=[normalised("title", to="title_norm")],
        )
    ]

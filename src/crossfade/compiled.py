"""Functions made when an entity is declared: one column's test, a child's rows, a child's value.

They are generated from the expressions in columns.py, for the reason given there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from crossfade.columns import EXPRESSION_NAMES, ColumnKind
from crossfade.fields import MISSING, Child
from crossfade.values import Unmappable, encode_document


def compile_function(lines: Sequence[str], names: dict[str, Any], function: str, entity: str) -> Any:
    """Compile source lines into the function they define.

    Args:
        lines: the source; only expressions of columns.py and names as literals, nothing of any document.
        names: what the source refers to.
        function: the function's name in the source.
        entity: whose it is, for tracebacks.
    """
    exec(compile("\n".join(lines), f"<{function} of entity {entity}>", "exec"), names)  # noqa: S102
    return names[function]


def exact_value(kind: ColumnKind, fits: Callable[[Any], bool] | None) -> Callable[[Any], Any]:
    """A function from a BSON value to the column's value, or `MISSING` when the column does not hold it."""
    test, store = kind.accepts.replace("@", "v"), kind.store.replace("@", "v")
    check = f" and fits({store})" if fits is not None else ""
    lines = ["def exact(v):", f"    return {store} if {test}{check} else M"]
    compiled: Callable[[Any], Any] = compile_function(
        lines, {**EXPRESSION_NAMES, "M": MISSING, "fits": fits}, "exact", "column"
    )
    return compiled


def value_rows(child: Child, kind: ColumnKind, nullable: bool) -> Callable[[str, Any], Any]:
    """A function from owner and field value to child rows with one value column, None when it does not
    fit."""
    test, store = kind.accepts.replace("@", "v"), kind.store.replace("@", "v")
    if nullable and child.is_list:
        test, store = f"(v is None or {test})", f"None if v is None else {store}"
    if child.is_list:
        lines = [
            "def rows(i, field):",
            "    if type(field) is not list: return None",
            f"    if [1 for v in field if not ({test})]: return None",
            f"    return tuple([(i, n, {store}) for n, v in enumerate(field)])",
        ]
    else:
        lines = ["def rows(i, v):", f"    return ((i, {store}),) if {test} else None"]
    compiled: Callable[[str, Any], Any] = compile_function(lines, dict(EXPRESSION_NAMES), "rows", child.field)
    return compiled


def split_rows(
    child: Child, kinds: Sequence[ColumnKind], nullable: Sequence[bool]
) -> Callable[[str, Any], Any]:
    """The same for a value that is spread over several columns."""
    assert child.split is not None
    to_columns, from_columns = child.split
    what = f"field {child.field!r}: its split function"
    columns = tuple(zip(child.values, kinds, nullable, strict=True))

    def spread(value: Any) -> tuple[Any, ...] | None:
        parts = call(to_columns, value, what)
        if parts is None or set(parts) != set(child.values):
            return None
        for name, kind, may_be_null in columns:
            part = parts[name]
            if not (may_be_null if part is None else kind.storable(part)):
                return None
        if not _same(call(from_columns, parts, what), value):
            return None
        return tuple(parts[name] for name in child.values)

    def rows(owner: str, value: Any) -> tuple[tuple[Any, ...], ...] | None:
        if not child.is_list:
            part = spread(value)
            return None if part is None else ((owner, *part),)
        if type(value) is not list:
            return None
        spreads = [spread(item) for item in value]
        if None in spreads:
            return None
        return tuple((owner, n, *part) for n, part in enumerate(spreads) if part is not None)

    return rows


def value_of(child: Child, kinds: Sequence[ColumnKind]) -> Callable[[Any], Any]:
    """A function from child rows to the field's value."""
    names: dict[str, Any] = dict(EXPRESSION_NAMES)
    first = 2 if child.is_list else 1
    if child.split is None:
        load = kinds[0].load.replace("@", "v")
        item = f"[None if v is None else {load} for v in [row[2] for row in rows]]"
        single = f"v = rows[0][1]\n    return None if v is None else {load}"
    else:
        names["put_together"] = child.split[1]
        names["columns"] = child.values
        part = f"put_together(dict(zip(columns, row[{first}:])))"
        item, single = f"[{part} for row in rows]", f"row = rows[0]\n    return {part}"
    if child.is_list:
        names["position"] = lambda row: row[1]
        lines = [
            "def value(rows):",
            "    if len(rows) > 1: rows = sorted(rows, key=position)",
            f"    return {item}",
        ]
    else:
        lines = ["def value(rows):", "    if not rows: return None", f"    {single}"]
    compiled: Callable[[Any], Any] = compile_function(lines, names, "value", child.field)
    return compiled


def call(function: Callable[[Any], Any], argument: Any, what: str) -> Any:
    """Call a function of the declaration; `Unmappable`, naming it as `what`, when it raises."""
    try:
        return function(argument)
    except Exception as error:
        # Not the error's own text: it may quote the value, which may be a secret.
        raise Unmappable(f"{what} raised {type(error).__name__}") from error


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, str | bytes | int):
        return bool(one == other)
    return encode_document({"v": one}) == encode_document({"v": other})

"""Counts the values that rows of a columnar file become: runs of nulls and shared lists take no memory before."""

from typing import Any


def count_values(batch: Any) -> int:
    """Return how many Python objects the rows of an Arrow record batch become; more, if nested values are shared."""
    return sum(map(_count, batch.columns))


def _count(array: Any) -> int:
    import pyarrow as pa  # noqa: PLC0415 (slow to import)

    kind, rows = array.type, len(array)
    if pa.types.is_struct(kind):
        return rows + sum(map(_count, array.flatten()))
    if pa.types.is_map(kind):
        start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return rows + sum(_count(part.slice(start, end - start)) for part in (array.keys, array.items))
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return rows + _count_views(array)
    if shared := _shared(array):
        return rows + rows * sum(map(_count_nested, shared))
    return rows + (_count(array.flatten()) if pa.types.is_nested(kind) else 0)


def _shared(array: Any) -> list[Any]:
    """Return the arrays of values that any number of rows may have in common."""
    import pyarrow as pa  # noqa: PLC0415 (as above)

    kind = array.type
    if pa.types.is_dictionary(kind):
        return [array.dictionary]
    if pa.types.is_run_end_encoded(kind):
        return [array.values]
    return [array.field(number) for number in range(kind.num_fields)] if pa.types.is_union(kind) else []


def _count_views(array: Any) -> int:
    import pyarrow.compute as pc  # noqa: PLC0415 (slow to import)

    if len(array) == 1:
        return _count(array[0].values) if array[0].is_valid else 0
    shown = pc.sum(pc.list_value_length(array)).as_py() or 0
    return _count(array.values) if shown <= len(array.values) else shown + len(array) * _count_nested(array.values)


def _count_nested(array: Any) -> int:
    """Return the values in nested ones, all of which a single row may have."""
    import pyarrow as pa  # noqa: PLC0415 (as above)

    return _count(array) if pa.types.is_nested(array.type) else 0

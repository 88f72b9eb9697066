"""Tables that are printed: columns as wide as their widest cell."""

from data_pipeline.text_table import text_table
from kernels.aligned_text import aligned

ROWS = [("name", "count", "note"), ("a longer one", "7", ""), ("b", "12,345", "last")]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    expected = [
        "name           count  note",
        "a longer one       7",
        "b             12,345  last",
    ]
    assert text_table(ROWS, left=(0, 2)).splitlines() == expected
    assert aligned(ROWS, left=(0, 2)).splitlines() == expected
    assert text_table([("a", "b"), ("ccc", "d")], left=()).splitlines() == ["  a  b", "ccc  d"]
    assert text_table([]) == aligned([]) == ""


def test_a_short_row_of_a_kernel_table_widens_no_column() -> None:
    lines = aligned([*ROWS, ("a remark as long as it likes",)], left=(0, 2)).splitlines()
    assert lines == [*aligned(ROWS, left=(0, 2)).splitlines(), "a remark as long as it likes"]

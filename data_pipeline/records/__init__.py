"""Records as people have them, read the same by every format: `parse_record`."""

from data_pipeline.records.metadata import check_others
from data_pipeline.records.record import Record, parse_record, record_kind

__all__ = ["Record", "check_others", "parse_record", "record_kind"]

"""One page of a run, or of two side by side: tables, pictures and machine, in a single file."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from kernels.profile.measured_run import failures
from kernels.profile.run_tables import (
    EXPLANATION,
    Table,
    case_table,
    floors_table,
    kernel_table,
    targets_table,
)
from kernels.profile.targets import Target

TITLE = "Profile of the projector"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222 }
main { display: flex; gap: 2rem } section { flex: 1; min-width: 0 }
.wide { overflow-x: auto } img { max-width: 100% } pre { white-space: pre-wrap }
table { border-collapse: collapse; font-size: 13px; margin: .3rem 0 1rem }
td, th { padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td, th { white-space: nowrap }
td:first-child, th:first-child { text-align: left } details { margin-bottom: 1rem }
.bad { color: #b00; font-weight: bold } .note { color: #555; font-size: 13px }
"""


@dataclass(frozen=True)
class Report:
    """A run as the page shows it; commands: what looks closer at the same cases.

    tables: in place of the projector's, which are made of the content.
    """

    title: str
    content: dict[str, Any]
    pictures: Sequence[Path]
    commands: Sequence[str] = ()
    tables: Sequence[Table] | None = None


def write_page(
    path: Path, reports: Sequence[Report], comparison: Table | None = None, title: str = TITLE
) -> None:
    """One column per run; a comparison stands above them."""
    above = _table(comparison) if comparison else ""
    columns = "".join(f"<section>{''.join(_column(report))}</section>" for report in reports)
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}"
        f"</style><h1>{title}</h1>{above}<main>{columns}</main></html>\n"
    )


def _column(report: Report) -> Iterator[str]:
    content = report.content
    yield f"<h2>{escape(report.title)}</h2>"
    if content["kind"].startswith("calculated"):
        yield "<p><b>Calculated: nothing was timed.</b></p>"
    for line in failures(content):
        yield f"<p class=bad>{escape(line)}</p>"
    for picture in report.pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        yield f'<p><img alt="{escape(picture.stem)}" src="data:image/png;base64,{data}"></p>'
    if report.tables is not None:
        yield from map(_table, report.tables)
    elif content["kind"] == "calculated":
        yield _table(floors_table(content["cases"]))
    else:
        yield _table(targets_table([Target(**target) for target in content.get("targets", ())]))
        for record in content["cases"]:
            yield _table(case_table(record))
            for name, found in record["providers"].items():
                if "kernels" in found:
                    table = kernel_table(record, name)
                    title = escape(table.title)
                    yield f"<details><summary>{title}</summary>{_table(table)}</details>"
        yield f"<p class=note>{escape(EXPLANATION)}</p>"
    settings = {f"setting {name}": value for name, value in content.get("settings", {}).items()}
    facts = content["machine"] | settings
    rows = [[name, str(value)] for name, value in facts.items() if value is not None]
    yield _table(Table("machine, versions, settings", ["", ""], rows))
    if report.commands:
        yield f"<h3>Closer</h3><pre>{escape(chr(10).join(report.commands))}</pre>"


def _table(table: Table) -> str:
    if not table.rows:
        return ""

    def row(tag: str, cells: Sequence[str]) -> str:
        bad = ' class="bad"' if any("NOT MET" in c or "SLOWER" in c for c in cells) else ""
        return f"<tr{bad}>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    note = "<br>".join(escape(line) for line in table.note.splitlines())
    body = row("th", table.header) + "".join(row("td", cells) for cells in table.rows)
    return f"{title}<div class=wide><table>{body}</table></div><p class=note>{note}</p>"

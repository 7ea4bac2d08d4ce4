"""The tables and pictures of README and docs that depend on the demo model, made by one command.

configs/study/docs.yaml lists them. A table stands in its document between two comments:

    <!-- table NAME -->
    ...
    <!-- end of table -->
"""

from __future__ import annotations

import importlib
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.evaluation.appendix_f.measures import FRECHET, MEASURES
from ldm.text import read_json, read_text
from ldm.util import written_whole

# A rehearsal goes through everything with as little drawing as possible.
REHEARSAL = ("--n_prompts", "2", "--n_seeds", "1", "--steps", "2")
REHEARSED_PICTURE = ("--steps", "2")
WORK = ("work_left", "saved_work", "saved_whole")  # what a column may have besides measures

logger = logging.getLogger(__name__)


def make_docs(spec: Mapping[str, Any], root: Path, outdir: Path, is_rehearsal: bool) -> list[Path]:
    """Run the experiments, fill the tables, and copy the pictures.

    Args:
        spec: ``experiments``: name -> flags of appendix_f, after those that are ``common`` to all;
            ``tables``: name -> ``file``, ``columns`` (title -> experiment, size and measure) and
            ``rows`` (label -> setting);
            ``pictures``: file -> ``experiment`` or ``program`` with ``flags``, and ``take``, the
            file that it writes.
        root: of the documents.
        outdir: of the experiments, which go on where they were stopped.
        is_rehearsal: draw next to nothing, and leave the documents alone: they are written
            below ``outdir``.

    Returns: the files that were written.

    Raises:
        InputError: the list cannot be used, a document has no place for a table, or an experiment
            lacks a row.
    """
    check(spec)
    documents = {name: root / table["file"] for name, table in spec["tables"].items()}
    for name, path in documents.items():
        fill(read_text(path), name, "", path)  # complains before anything is drawn
    tables = {}
    for name, flags in spec["experiments"].items():
        logger.info("Experiment %s", name)
        folder = outdir / name
        flags = [*spec.get("common", ()), *flags]
        _run("ldm.evaluation.appendix_f.program", flags, folder, REHEARSAL * is_rehearsal)
        tables[name] = read_json(folder / "report/table.json", limit=2**30)["table"]
    target = outdir / "rehearsal" if is_rehearsal else root
    texts = {path: read_text(path) for path in documents.values()}
    for name, table in spec["tables"].items():
        path = documents[name]
        texts[path] = fill(texts[path], name, markdown(table, tables, name), path)
    written = []
    for path, text in texts.items():
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place, "w") as file:
            file.write(text)
        written.append(place)
    for name, picture in spec["pictures"].items():
        place = target / name
        folder = outdir / picture.get("experiment", f"pictures/{place.stem}")
        if "program" in picture:
            shutil.rmtree(folder, ignore_errors=True)
            _run(picture["program"], picture["flags"], folder, REHEARSED_PICTURE * is_rehearsal)
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place) as file:
            file.write((folder / picture["take"]).read_bytes())
        written.append(place)
    return written


def check(spec: Mapping[str, Any]) -> None:
    """Complain of a list of tables and pictures that cannot be made, before anything is drawn.

    Raises:
        InputError: of the first thing that is wrong.
    """
    experiments, measures = spec["experiments"], (*WORK, *MEASURES, FRECHET)
    for name, table in spec["tables"].items():
        keys = {*table} if isinstance(table, Mapping) else set()
        is_whole = {"file", "columns", "rows"} <= keys
        if not is_whole or not all(isinstance(table[k], Mapping) for k in ("columns", "rows")):
            raise InputError(f"table {name}: it needs file, columns and rows")
        for title, what in table["columns"].items():
            words = str(what).split()
            if len(words) != 3 or words[0] not in experiments or not words[1].isdecimal():
                raise InputError(
                    f"table {name}: {title}: {what}: allowed is an experiment "
                    f"({', '.join(experiments)}), a size and a measure"
                )
            measure = words[2].partition("@")[0].removesuffix("+")
            if measure not in measures:
                raise InputError(
                    f"table {name}: {title}: {measure}: measures are {', '.join(measures)}"
                )
    for name, picture in spec["pictures"].items():
        keys = {*picture} if isinstance(picture, Mapping) else set()
        is_known = "experiment" in keys and picture["experiment"] in experiments
        if "take" not in keys or not (is_known or {"program", "flags"} <= keys):
            raise InputError(f"picture {name}: it needs take, and experiment or program and flags")


def _run(program: str, flags: Sequence[Any], folder: Path, more: Sequence[str]) -> None:
    argv = [*map(str, flags), *more, "--outdir", str(folder)]
    importlib.import_module(program).main(argv)


def fill(text: str, name: str, content: str, path: Path) -> str:
    """A document with a table in its place.

    Raises:
        InputError: there is no such place.
    """
    pattern = rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end of table -->)"
    filled, n = re.subn(pattern, lambda m: m[1] + content + m[2], text, flags=re.DOTALL)
    if n != 1:
        raise InputError(f"{path}: there must be one place for the table {name}, not {n}")
    return filled


def markdown(
    table: Mapping[str, Any], experiments: Mapping[str, Sequence[Mapping[str, Any]]], name: str
) -> str:
    """A table in Markdown.

    Args:
        table: its ``columns`` and ``rows``.
        experiments: rows of the experiments' table.json, by name.
        name: of the table, for messages.

    Raises:
        InputError: a setting was not drawn.
    """
    columns = table["columns"]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for label, setting in table["rows"].items():
        cells = []
        for what in columns.values():
            experiment, size, measure = what.split()
            measure, _, ratio = measure.partition("@")
            wanted = f"{setting} {ratio}" if ratio else setting
            found = [
                row
                for row in experiments[experiment]
                if row["size"] == int(size)
                and (row["setting"] == wanted or _is_at(row, setting, ratio))
            ]
            if not found and not ratio:
                raise InputError(f"table {name}: {experiment} has no setting {wanted!r} at {size}")
            cells.append(cell(found[0], measure) if found else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _is_at(row: Mapping[str, Any], preset: str, ratio: str) -> bool:
    """Whether a row is a preset as it is, which has that ratio."""
    own = row["tome"].get("ratio")
    is_own = row["setting"] == preset and isinstance(own, float) and bool(ratio)
    return is_own and abs(own - float(ratio)) < 0.005


def cell(row: Mapping[str, Any], what: str) -> str:
    """A number of a row: a share, or another measure, with its interval if it ends in ``+``.

    Grey, here in italics, is what is above the precision floor.
    """
    if what == WORK[0]:
        return f"{1 - row['saved_work']:.0%}".replace("%", " %")
    if what in WORK:
        return "" if row[what] is None else f"{row[what]:.0%}".replace("%", " %")
    name = what.removesuffix("+")
    one = row["measures"].get(name)
    if one is None:
        return ""
    digits = MEASURES[name].digits if name in MEASURES else 1
    digits = 1 if name == "psnr_db" else digits
    if name == "attributes":
        return f"{one['mean']:.1%}".replace("%", " %")
    text = f"{one['mean']:.{digits}f}"
    if name in row.get("above_floor", ()):
        text = f"*{text}*"
    return f"{text} [{one['low']:.{digits}f}, {one['high']:.{digits}f}]" if what != name else text

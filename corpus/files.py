"""Reading: a file, a folder or a data set of the hub becomes rows, and every text stays what the source says.

Files of text are read here, with the standard library.  Readers that guess types refuse or change right files: "NA" and
"null" become nothing, "007" a number, a date a date; and a .jsonl whose later rows have another type in a column that
nobody reads is refused.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import sys
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from typing import Any
from xml.etree.ElementTree import ParseError

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from corpus.formats import KNOWN_COLUMNS, REPLY_COLUMNS, are_turns, from_json, is_turn, prompt_reader
from utils.arguments import DataArguments
from utils.console import InputError, one_line, say
from utils.hashing import in_share

Row = dict[str, Any]

PLAIN_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
FILE_FORMATS = (*PLAIN_FORMATS, ".parquet", ".xlsx", *(f"{suffix}.gz" for suffix in PLAIN_FORMATS))
MAYBE_TURNS = ("prompt", "response", "completion", "chosen", "rejected")  # columns of texts or of dialogues
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "eval": "validation"}
# What datasets, pyarrow, openpyxl and gzip raise for names, splits and content.
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    AttributeError,
    zlib.error,
    zipfile.BadZipFile,
    ParseError,
    csv.Error,
    pa.ArrowException,
    DatasetGenerationError,
)


@dataclass(frozen=True)
class Rows:
    """Rows of a data set.  Only columns that some format knows are kept; `column_names` has them all."""

    column_names: list[str]
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def select(self, indices: Iterable[int]) -> "Rows":
        """The rows at these places."""
        return Rows(self.column_names, [self.rows[index] for index in indices])


def plain(column: str) -> str:
    """A column's name without what people do not see as a difference: case, spaces around it, ü in one sign or in two."""
    return unicodedata.normalize("NFC", column.strip()).casefold()


@dataclass(frozen=True)
class Known:
    """The names of columns to read: those that are `wanted`, by their plain names, and with `others` every other one."""

    wanted: frozenset[str]
    others: bool = False

    def __contains__(self, column: str) -> bool:
        return bool(column) and (self.others or plain(column) in self.wanted)  # some tables have columns without a name


def suffix_of(name: str) -> str:
    """The end of a name that tells its format: ".csv", ".csv.gz"."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + suffix if suffix == ".gz" else suffix


def read_dataset(
    name: str,
    split: str = "train",
    data_dir: str | None = None,
    columns: dict[str, str] | None = None,
    all_columns: bool = False,
) -> Rows:
    """Rows of a local file, of a folder of shards, of a save_to_disk folder, or of a data set of the hub.

    columns: what the columns are called here -> in the data set; no others are read then.  all_columns: keep the others too.
    Raises InputError when there is no such thing, it cannot be parsed, a column is missing, or it has no rows.
    """
    known = Known(KNOWN_COLUMNS if columns is None else frozenset(map(plain, columns.values())), all_columns)
    try:
        rows = _read(name, split, data_dir, known)
    except READ_ERRORS as error:
        # how datasets says that a file, or a folder of save_to_disk, has no rows
        if "corresponds to no data" in str(error) or type(error) is IndexError:
            raise InputError(f"the dataset {name} has no rows; give one that has") from error
        # DatasetGenerationError says nothing itself: what was wrong with the content is in its cause
        reason = one_line(error.__cause__ or error)
        raise InputError(f"cannot read the dataset {name}: {reason}; check the name, or correct the file") from error
    if len(rows) == 0:
        raise InputError(f"the dataset {name} has no rows; give one that has")
    return _with_turns(name, _rename(name, rows, columns, all_columns))


def _read(name: str, split: str, data_dir: str | None, known: Known) -> Rows:
    suffix = suffix_of(name)
    if os.path.isfile(name):
        if suffix not in FILE_FORMATS:
            raise InputError(f"{name} ends in {suffix or 'nothing'}; give one of {', '.join(FILE_FORMATS)}")
        return read_files([name], known)
    if os.path.isdir(name):
        if any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(name)
            return _of_arrow(saved[split] if isinstance(saved, DatasetDict) else saved, known)
        shards = find_shards(os.path.join(name, data_dir or ""), split)
        if shards:
            return read_files(shards, known)
    elif suffix in FILE_FORMATS or name.startswith((".", "/", "~")):
        raise InputError(f"there is no file or folder {name}; check --dataset")
    return _of_arrow(load_dataset(name, data_dir=data_dir, split=split), known)


def _of_arrow(rows: Dataset, known: Known) -> Rows:
    rows.data.validate(full=True)  # pyarrow takes any bytes for text, and fails when a row is read
    kept = [column for column in rows.column_names if column in known]
    return Rows(rows.column_names, rows.select_columns(kept) if kept else [{}] * len(rows))


def find_shards(folder: str, split: str) -> list[str]:
    """The data files under a folder, in the order of their names: those of the split where their names tell splits.

    Where there are files of several formats, those of the most common one.
    """
    found = [
        os.path.join(place, file)
        for place, folders, files in os.walk(folder)
        for file in files
        if suffix_of(file) in FILE_FORMATS and suffix_of(file).removesuffix(".gz") != ".txt"
        if not file.startswith((".", "dataset_info"))
        if not any(part.startswith(".") for part in os.path.relpath(place, folder).split(os.sep) if part != ".")
    ]
    if not found:
        return []
    formats = Counter(suffix_of(path).removesuffix(".gz") for path in found)
    chosen = formats.most_common(1)[0][0]
    if len(formats) > 1:
        others = ", ".join(suffix for suffix in formats if suffix != chosen)
        say(f"note: {folder} holds files of several formats; its {chosen} files are read, {others} are not")
    shards = sorted(path for path in found if suffix_of(path).removesuffix(".gz") == chosen)
    splits = {path: _split_named(os.path.relpath(path, folder)) for path in shards}
    if set(splits.values()) == {None} and split == "train":
        return shards
    wanted = SPLITS.get(split, split)
    of_split = [path for path, named in splits.items() if named == wanted]
    if not of_split and split == "train":
        return [path for path, named in splits.items() if named is None]
    if not of_split:
        names = ", ".join(sorted({named or "train" for named in splits.values()}))
        raise InputError(f"no file under {folder} is of the split {split}; found {names}; change --dataset_split")
    return of_split


def _split_named(path: str) -> str | None:
    """The split that a path names as a word of its own, as datasets tells it: train-00000-of-00002.parquet."""
    words = re.split(r"[^a-z]+", path.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def read_files(paths: Sequence[str], known: Known) -> Rows:
    """The rows of files one behind the other.  Raises InputError that names the file and the place in it."""
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for path in paths:
        if os.path.getsize(path) == 0:
            raise InputError(f"the dataset {path} is an empty file; give one that has rows")
        suffix = suffix_of(path).removesuffix(".gz")
        if suffix == ".parquet":
            found: Iterable[Row] = _parquet_rows(path, known, columns)
        elif suffix == ".xlsx":
            found = _excel_rows(path, known, columns)
        else:
            with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
                found = list(PLAIN_READERS[suffix](path, file, known, columns))
        rows += ({name: value for name, value in row.items() if name in known} for row in found)
    return Rows(list(columns), rows)


def _parquet_rows(path: str, known: Known, columns: dict[str, None]) -> list[Row]:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    columns.update(dict.fromkeys(names))
    table = file.read(columns=[name for name in names if name in known])
    table.validate(full=True)
    return table.to_pylist()


def _excel_rows(path: str, known: Known, columns: dict[str, None]) -> Iterator[Row]:
    """The first sheet.  A cell is what it holds as text: 7.5, True, 2021-05-01; how Excel shows it is not in there."""
    try:
        import openpyxl
    except ImportError as error:
        raise InputError(
            f"{path} is an Excel table, for which openpyxl is missing; pip install -r requirements-excel.txt, or save "
            "the sheet as .csv"
        ) from error
    sheets = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets
    if len(sheets) > 1:
        say(f"note: {path} has {len(sheets)} sheets; the first one, {sheets[0].title}, is read")
    lines = ([_cell(value) for value in line] for line in sheets[0].iter_rows(values_only=True))
    names = next(lines, [])
    _check_names(path, names, known, columns)
    return (dict(zip(names, line, strict=False)) for line in lines if any(line))


def _cell(value: Any) -> str:
    if isinstance(value, datetime) and value.time() == time():
        value = value.date()
    return "" if value is None else str(value)


def _json_lines(path: str, file: Any, known: Known, columns: dict[str, None]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _json_object(path, f"line {number}", line, known, columns)


def _json_file(path: str, file: Any, known: Known, columns: dict[str, None]) -> Iterator[Row]:
    """An array of objects, also under a key of its own, one object, or JSON lines under another name."""
    content = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        yield from _json_lines(path, io.BytesIO(content), known, columns)
        return
    if isinstance(value, dict):
        value = _unwrap(path, value, known)
    for number, element in enumerate(value if isinstance(value, list) else [value], 1):
        yield _check_object(path, f"element {number}", element, known, columns)


def _unwrap(path: str, value: Row, known: Known) -> Row | list[Row]:
    """The one list of rows in an object, as in {"data": [...]}; the object itself where it is a row."""
    lists = {name: part for name, part in value.items() if _are_rows(part)}
    if not lists or any(plain(name) in known.wanted for name in value.keys() - lists.keys()):
        return value
    if len(lists) > 1:
        found = ", ".join(f"{name} ({len(part)})" for name, part in lists.items())
        raise InputError(f"{path} holds several lists of rows: {found}; save each as a file of its own")
    ((name, rows),) = lists.items()
    others = ", ".join(other for other in value if other != name)
    say(f"note: the {len(rows)} rows of {path} are those under {name}" + (f"; not read: {others}" if others else ""))
    return rows


def _are_rows(value: Any) -> bool:
    """Whether this is a list of objects that are not the turns of a dialogue."""
    objects = bool(value) and isinstance(value, list) and all(isinstance(part, dict) for part in value)
    return objects and not any(is_turn(part) and ("content" in part or "value" in part) for part in value)


def _json_object(path: str, place: str, line: bytes, known: Known, columns: dict[str, None]) -> Row:
    try:
        value = json.loads(line.removeprefix(codecs.BOM_UTF8), object_pairs_hook=_only_once)
    except (ValueError, RecursionError) as error:
        reason = one_line(error)
        raise InputError(
            f"cannot read the dataset {path}: {place} is not JSON in UTF-8 ({reason}); correct the file"
        ) from error
    return _check_object(path, place, value, known, columns)


def _only_once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"column {twice} was specified twice")
    return row


def _check_object(path: str, place: str, value: Any, known: Known, columns: dict[str, None]) -> Row:
    if not isinstance(value, dict):
        raise InputError(
            f"cannot read the dataset {path}: {place} holds {type(value).__name__}, not an object with the columns; "
            "correct the file"
        )
    columns.update(dict.fromkeys(value))
    row = {name: part for name, part in value.items() if name in known}
    try:
        json.dumps(row, ensure_ascii=False).encode()  # half of an emoji's pair of \u is no text
    except (ValueError, RecursionError) as error:
        reason = one_line(error)
        raise InputError(
            f"cannot read the dataset {path}: {place} is not JSON in UTF-8 ({reason}); correct the file"
        ) from error
    return row


def _table(path: str, file: Any, known: Known, columns: dict[str, None]) -> Iterator[Row]:
    """A .csv or .tsv: every field is text.  A .csv whose first line has no comma may be cut by semicolons or tabs."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    first = text.readline()
    text.seek(0)
    marks = "\t" if suffix_of(path).startswith(".tsv") else ",;\t"
    mark = next((mark for mark in marks if mark in first), marks[0])
    lines = csv.reader(text, delimiter=mark, strict=True)
    names = next(lines, [])
    _check_names(path, names, known, columns)
    for fields in lines:
        if len(fields) > len(names):
            raise InputError(
                f"cannot read the dataset {path}: line {lines.line_num} has more fields than its first line "
                f"names ({len(fields)}, not {len(names)}); quote texts that hold a comma"
            )
        if fields:  # a blank line is no row
            yield dict(zip(names, [*fields, *[None] * (len(names) - len(fields))], strict=True))


def _check_names(path: str, names: list[str], known: Known, columns: dict[str, None]) -> None:
    """Note the columns of a table's first line.  Raises InputError when one that is read is there twice."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name in known]
    if twice:
        raise InputError(f"cannot read the dataset {path}: its first line names {twice[0]} twice; rename one")
    columns.update((name, None) for name in names if name)


def _text_lines(path: str, file: Any, known: Known, columns: dict[str, None]) -> Iterator[Row]:
    """A prompt a line."""
    columns["prompt"] = None
    for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
        yield {"prompt": line.strip()}


PLAIN_READERS = {
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _text_lines,
}


def _rename(name: str, rows: Rows, columns: dict[str, str] | None, all_columns: bool) -> Rows:
    """The rows under the names of --columns, or under those that the formats know.

    With --columns whatever is not named there is left out, or keeps its name.
    """
    if columns is None:
        # functions that judge replies get what stands beside a prompt by its own name
        wanted = KNOWN_COLUMNS - REPLY_COLUMNS if all_columns else KNOWN_COLUMNS
        known = {_column(name, column, rows.column_names): column for column in sorted(wanted)}
        ours = {column: known.get(column, column) for column in rows.column_names}
        if all(new == column for column, new in ours.items()):
            return rows
        return Rows(list(ours.values()), [{ours[column]: value for column, value in row.items()} for row in rows])
    own = {ours: _column(name, theirs, rows.column_names) for ours, theirs in columns.items()}
    missing = [columns[ours] for ours, theirs in own.items() if theirs is None]
    if missing:
        raise InputError(
            f"--columns names {missing[0]}, which the dataset {name} does not have; found {', '.join(rows.column_names)}"
        )
    unused = [column for column in rows.column_names if column not in own.values()]
    if all_columns:
        own = {**{column: column for column in unused}, **own}
    elif unused:
        say(f"note: columns of {name} that are not used: {', '.join(unused)}")
    return Rows(list(own), [{ours: row.get(theirs) for ours, theirs in own.items()} for row in rows])


def _column(name: str, wanted: str, found: list[str]) -> str | None:
    """The column that is called so, or else the one that is but for case and spaces.  Raises InputError where two are."""
    if wanted in found:
        return wanted
    alike = [column for column in found if plain(column) == plain(wanted)]
    if len(alike) > 1:
        raise InputError(
            f"the dataset {name} has {len(alike)} columns {wanted} that differ in case or spaces alone: "
            f"{', '.join(map(repr, alike))}; rename one, or choose with --columns"
        )
    return alike[0] if alike else None


def _with_turns(name: str, rows: Rows) -> Rows:
    """The rows with turns in the place of JSON text, in columns that hold nothing but dialogues.

    One text among others that looks like a dialogue stays a text: somebody asked for it.
    """
    found = [column for column in rows.column_names if column in MAYBE_TURNS and _all_turns(rows, column)]
    if not found:
        return rows
    say(f"note: {', '.join(found)} of {name} hold dialogues as JSON text; they are read as turns")
    return Rows(
        rows.column_names, [{**row, **{column: from_json(row.get(column)) for column in found}} for row in rows]
    )


def _all_turns(rows: Rows, column: str) -> bool:
    """Whether all that the column holds is dialogues as JSON text."""
    found = False
    for row in rows:
        value = row.get(column)
        if value is None or value == "":
            continue
        if not isinstance(value, str) or not are_turns(from_json(value)):
            return False
        found = True
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Training and held-out rows
# ---------------------------------------------------------------------------------------------------------------------


def train_and_eval_rows(data: DataArguments, default: str, all_columns: bool = False) -> tuple[Rows, Rows | None]:
    """Training rows, and held-out rows where the arguments ask for them.

    all_columns: with those that no format knows, which are for functions that judge replies.

    `eval_fraction` holds out whole prompts: rows that share a prompt fall on the same side, so nothing leaks.
    """
    name, columns = data.dataset or default, data.own_columns
    rows = read_dataset(name, data.dataset_split, data.dataset_data_dir, columns, all_columns)
    if data.eval_dataset is not None:
        held_out_at = data.eval_dataset, data.eval_dataset_split, data.eval_dataset_data_dir
        evaluation = read_dataset(*held_out_at, columns, all_columns)
        trained_on = {str(prompt) for prompt in map(prompt_reader(rows), rows)}
        shared = sum(str(prompt) in trained_on for prompt in map(prompt_reader(evaluation), evaluation))
        if shared:
            say(
                f"warning: {shared} of the {len(evaluation)} rows of --eval_dataset have a prompt that is trained on too, "
                "so their figures say little about new prompts"
            )
        return rows, evaluation
    if data.eval_fraction == 0:
        return rows, None
    # by the text alone: a prompt is on the same side in every run and every stage
    held_out = [in_share(str(prompt), data.eval_fraction) for prompt in map(prompt_reader(rows), rows)]
    train = rows.select(i for i, out in enumerate(held_out) if not out)
    evaluation = rows.select(i for i, out in enumerate(held_out) if out)
    if len(train) == 0 or len(evaluation) == 0:
        raise InputError(
            f"--eval_fraction {data.eval_fraction} of {len(rows)} rows leaves {len(train)} for training and "
            f"{len(evaluation)} for evaluation; change the share or give --eval_dataset"
        )
    return train, evaluation

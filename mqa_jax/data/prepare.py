"""Raw text to tokenized, packed rows on disk, once:

    python -m mqa_jax.data.prepare --config=configs/multi30k.py [--config.data.dir=DIR ...]

It reads `config.data` only; `mqa_jax.data.request` has its fields.
"""

import contextlib
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from absl import app, flags
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from mqa_jax.core.lock import locked
from mqa_jax.data.manifest import (
    HUB_TOKENIZER,
    MANIFEST,
    RECORD,
    TOKENIZER,
    FileStats,
    Manifest,
    SplitStats,
    records_path,
    text_path,
)
from mqa_jax.data.packing import Pair, pack, to_tokens
from mqa_jax.data.raw import Example, RawText, own_files
from mqa_jax.data.request import check, check_same, directory_of, place, requested
from mqa_jax.data.tokenizer import MAX_PIECE_CHARACTERS, RowTokenizer, Tokenizer

INCOMPLETE = ".incomplete-"


def prepare(data: ConfigDict, tokenizer: RowTokenizer | None = None) -> Path:
    """Makes the directory of the data, or finds that it already is what is asked for.

    Args:
      data: `config.data`, see `mqa_jax.data.request`.
      tokenizer: one that is there already, that of a model to be trained further; one is trained
        when None.

    Returns:
      the directory.

    Raises:
      ValueError: the directory holds something else, or is not as it was prepared; fields make no
        sense; the raw text cannot be had; or an example is invalid and `on_invalid` is "error".
    """
    check(data)
    if data.get("subword_samples") and not isinstance(tokenizer, Tokenizer | None):
        raise ValueError(
            f"--config.data.subword_samples={data.subword_samples}: the tokenizer of "
            "--config.init_from knows one way to cut a text: leave it out"
        )
    files = None
    if data.path and data.dir and not place(data, "path").exists():
        # Prepared on another machine and copied here: no text, no hashes to compare.
        directory = directory_of(data, {})
        if (directory / MANIFEST).exists():
            manifest = Manifest.read(directory)
            print(f"{data.path} is not here: {directory} is taken to be made of it")
            request = requested(data, manifest.request["files"], tokenizer)
            return _found(directory, manifest, request)
    if data.path:
        files = own_files(data)
    request = requested(data, files.hashes if files else {}, tokenizer)
    directory = directory_of(data, request)
    if not (directory / MANIFEST).exists():
        with locked(directory, "preparing data", wait=True):
            # Whoever held it may have made it.
            if not (directory / MANIFEST).exists():
                manifest = _make(directory, data, request, RawText(data, files), tokenizer)
                print(_report(directory, manifest))
                return directory
    return _found(directory, Manifest.read(directory), request)


def _found(directory: Path, manifest: Manifest, request: dict[str, Any]) -> Path:
    """The directory, if it is what is asked for, and as it was prepared."""
    check_same(directory, manifest, request)
    manifest.check_files(directory)
    return directory


def _make(
    directory: Path,
    data: ConfigDict,
    request: dict[str, Any],
    raw: RawText,
    given: RowTokenizer | None,
) -> Manifest:
    most = MAX_PIECE_CHARACTERS if given is None else given.max_characters
    # What a killed process has left; it holds no lock.
    for left in directory.glob(f"{INCOMPLETE}*"):
        shutil.rmtree(left)
    if data.on_invalid == "error":
        # What can be named before a tokenizer is trained is named before.
        for split in request["splits"]:
            if split != "train":
                deque(_texts(raw, data, split, Counter(), most), maxlen=0)
    with tempfile.TemporaryDirectory(prefix=INCOMPLETE, dir=directory) as name:
        incomplete = Path(name)
        if given is None:
            train = (
                text
                for example in _texts(raw, data, "train", Counter(), most)
                for text in example.texts.values()
            )
            tokenizer: RowTokenizer = Tokenizer.train(
                train, incomplete / TOKENIZER, data.vocab_size
            )
        else:
            tokenizer = given
            (incomplete / tokenizer.file_name).write_bytes(tokenizer.content)
        splits = {
            split: _write_split(raw, tokenizer, data, split, incomplete)
            for split in request["splits"]
        }
        written = {file.name: FileStats.of(file) for file in sorted(incomplete.iterdir())}
        manifest = Manifest(request=request, splits=splits, files=written)
        manifest.write(incomplete)
        # One of another kind would be taken for this data's.
        for name in {TOKENIZER, HUB_TOKENIZER} - written.keys():
            (directory / name).unlink(missing_ok=True)
        # The manifest comes last: whatever interrupts this, a directory with one is whole.
        for file in sorted(incomplete.iterdir(), key=lambda file: file.name == MANIFEST):
            file.replace(directory / file.name)
    return manifest


def _drop(
    raw: RawText, data: ConfigDict, split: str, example: Example, side: str, reason: str, way: str
) -> None:
    """Refuses an invalid example, unless it may be dropped."""
    if data.on_invalid == "error":
        raise ValueError(
            f"{raw.where(split, side, example)}: {reason}; {way}, or leave out all such examples, "
            "counted, with --config.data.on_invalid=drop"
        )


def _texts(
    raw: RawText, data: ConfigDict, split: str, dropped: Counter, most_characters: float
) -> Iterator[Example]:
    """The examples that can be valid, before there are tokens; the others are counted."""
    fields = {data.source: "source_length", data.target: "target_length"}
    # In fewer tokens they cannot be said. A megabyte in one line would not only be dropped in the
    # end: as one word it holds up the training of the tokenizer for minutes.
    most = {side: (data[field] - 1) * most_characters for side, field in fields.items()}
    # On a terminal only: in a log file a progress bar is one endless line.
    for example in tqdm(raw.examples(split), split, raw.count(split), disable=None, leave=False):
        blank = [side for side, text in example.texts.items() if not text.strip()]
        long = [side for side, text in example.texts.items() if len(text) > most[side]]
        if blank:
            _drop(raw, data, split, example, blank[0], "blank", "write or delete it on both sides")
            dropped["blank"] += 1
        elif long:
            reason = f"{len(example.texts[long[0]]):,} characters, {most[long[0]]:,} fit into a row"
            _drop(raw, data, split, example, long[0], reason, _shorten(fields[long[0]]))
            dropped["too_long"] += 1
        else:
            yield example


def _shorten(field: str) -> str:
    return f"raise --config.data.{field}, or split it"


def _sampled(
    pairs: Callable[[], Iterator[tuple[Example, Pair]]], tokenizer: Any, data: ConfigDict
) -> Iterator[tuple[Example, Pair]]:
    """The examples again and again, each time in pieces drawn anew, if a row has room for these."""
    lengths = {data.source: data.source_length, data.target: data.target_length}
    for seed in range(data.subword_samples):
        sentencepiece.set_random_generator_seed(seed)
        for example, pair in pairs():
            drawn = {
                side: tokenizer.sample(text, data.subword_alpha)
                for side, text in example.texts.items()
            }
            has_room = all(len(ids) <= lengths[side] for side, ids in drawn.items())
            yield example, (drawn.get(data.source, []), drawn[data.target]) if has_room else pair


def _pairs(
    raw: RawText, tokenizer: RowTokenizer, data: ConfigDict, split: str, dropped: Counter
) -> Iterator[tuple[Example, Pair]]:
    """The examples that a row has room for, and their ids; the others are counted in `dropped`."""
    fields = {data.source: "source_length", data.target: "target_length"}
    eos = tokenizer.ids.eos
    for example in _texts(raw, data, split, dropped, tokenizer.max_characters):
        ids = {
            side: tokenizer.encode(text) if side == data.source else tokenizer.encode_target(text)
            for side, text in example.texts.items()
        }
        ended = [side for side, sentence in ids.items() if eos in sentence[:-1]]
        long = [side for side, sentence in ids.items() if len(sentence) > data[fields[side]]]
        if long:
            field = fields[long[0]]
            reason = f"{len(ids[long[0]])} tokens, {data[field]} fit into a row"
            _drop(raw, data, split, example, long[0], reason, _shorten(field))
            dropped["too_long"] += 1
        elif ended:
            reason = f"it has, within, what is encoded as {eos}, the id that ends a text"
            _drop(raw, data, split, example, ended[0], reason, "take it out")
            dropped["spells_an_end"] += 1
        else:
            yield example, (ids.get(data.source, []), ids[data.target])


def _write_split(
    raw: RawText, tokenizer: RowTokenizer, data: ConfigDict, split: str, directory: Path
) -> SplitStats:
    dropped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        # Unpacking a compressed row costs more of a fast device's step than the disk is worth.
        options = "group_size:1,uncompressed"
        writer = ArrayRecordWriter(str(records_path(directory, split)), options)
        stack.callback(writer.close)
        lines = {
            side: stack.enter_context(
                text_path(directory, split, side).open("w", encoding="utf-8", newline="\n")
            )
            for side in (data.source, data.target)
            if side and split != "train"
        }

        def once() -> Iterator[tuple[Example, Pair]]:
            dropped.clear()
            return _pairs(raw, tokenizer, data, split, dropped)

        def pairs() -> Iterator[Pair]:
            is_sampled = split == "train" and data.get("subword_samples")
            for example, pair in _sampled(once, tokenizer, data) if is_sampled else once():
                for side, file in lines.items():
                    if "\n" in example.texts[side]:
                        raise ValueError(
                            f"{raw.where(split, side, example)}: the text holds a line break, but "
                            f"{text_path(directory, split, side).name} has one example a line: "
                            "name a split of single sentences"
                        )
                    file.write(example.texts[side] + "\n")
                yield pair

        rows: Iterator[list[Pair]] = ([pair] for pair in pairs())
        if data.pack:
            rows = pack(pairs(), data.source_length, data.target_length)
        for row in rows:
            tokens = to_tokens(row, data.source_length, data.target_length, tokenizer.ids)
            writer.write(tokens.astype(RECORD).tobytes())
            counts["rows"] += 1
            counts["examples"] += len(row)
            counts["source_tokens"] += sum(len(source) for source, _ in row)
            counts["target_tokens"] += sum(len(target) for _, target in row)
    if not counts["rows"]:
        raise ValueError(
            f"no example is left of {split}, all {dropped.total()} were dropped: {dict(dropped)}"
        )

    def fill(side: str) -> float:
        slots = counts["rows"] * data[f"{side}_length"]
        return round(counts[f"{side}_tokens"] / (slots or 1), 4)

    return SplitStats(
        **counts, source_fill=fill("source"), target_fill=fill("target"), dropped=dict(dropped)
    )


def _report(directory: Path, manifest: Manifest) -> str:
    lines = [f"{directory}:"]
    for split, stats in manifest.splits.items():
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in stats.dropped.items())
        # A language model has no source.
        fills = [f"{fill:.1%}" for fill in (stats.source_fill, stats.target_fill) if fill]
        lines.append(
            f"  {split:10} {stats.examples:,} examples in {stats.rows:,} rows, filled "
            f"{' and '.join(fills)}; dropped: {dropped or 'none'}"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    # Not at import: a script with a --config of its own imports this file.
    config = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py:VARIANT")
    flags.mark_flag_as_required("config")

    def run(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"arguments that mean nothing: {arguments[1:]}")
        if config.value.get("init_from"):
            raise app.UsageError("--config.init_from is for `mqa-jax prepare`, or train.py")
        prepare(config.value.data)

    app.run(run)


if __name__ == "__main__":
    main()

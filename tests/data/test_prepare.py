import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from ml_collections import ConfigDict

import mqa_jax.data
from mqa_jax.data import prepare as prepare_module
from mqa_jax.data import raw as raw_module
from mqa_jax.data.manifest import FORMAT, Manifest
from mqa_jax.data.prepare import prepare
from mqa_jax.data.text import read_lines
from mqa_jax.data.tokenizer import EOS_ID, Tokenizer


def rows(directory, split):
    """Lists of pairs of ids, read off the stored tokens by their EOS."""
    source = ArrayRecordDataSource(str(directory / f"{split}.array_record"))
    length = Manifest.read(directory).request["source_length"]
    packed = []
    for record in source.__getitems__(range(len(source))):
        tokens = np.frombuffer(record, "<i4")
        sources, targets = (
            [part.tolist() for part in np.split(side, np.flatnonzero(side == EOS_ID) + 1)[:-1]]
            for side in (tokens[:length], tokens[length:])
        )
        packed.append(list(zip(sources or [[]] * len(targets), targets, strict=True)))
    return packed


def texts(directory, split):
    """The pairs of a split as text."""
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    return [tuple(map(tokenizer.decode, pair)) for row in rows(directory, split) for pair in row]


def lines(text_dir, stem):
    return list(
        zip(*(read_lines(text_dir / f"{stem}.{side}") for side in ("en", "de")), strict=True)
    )


@pytest.mark.parametrize("pack", [True, False])
def test_everything_arrives(config, text_dir, pack):
    config.pack = pack
    directory = prepare(config)
    assert directory == Path(config.dir)
    stems = {"train": "train", "validation": "val", "test": "test"}
    manifest = Manifest.read(directory)
    for split, stem in stems.items():
        raw = lines(text_dir, stem)
        order = sorted if pack else list
        assert order(texts(directory, split)) == order(raw)
        stats, packed = manifest.split(split), rows(directory, split)
        pairs = [pair for row in packed for pair in row]
        assert (stats.examples, stats.rows, stats.dropped) == (len(raw), len(packed), {})
        assert stats.source_tokens == sum(len(source) for source, _ in pairs)
        assert stats.target_tokens == sum(len(target) for _, target in pairs)
        assert stats.source_fill == pytest.approx(stats.source_tokens / 37 / stats.rows, abs=1e-4)
        assert stats.target_fill == pytest.approx(stats.target_tokens / 41 / stats.rows, abs=1e-4)
        assert all(sentence[-1] == EOS_ID for pair in pairs for sentence in pair)
        if pack:
            assert stats.rows < stats.examples
        if split != "train":
            for i, side in enumerate(("en", "de")):
                assert read_lines(directory / f"{split}.{side}.txt") == [pair[i] for pair in raw]
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    assert (tokenizer.sha256, tokenizer.vocab_size) == (manifest.tokenizer_sha256, 293)
    assert {file.name for file in directory.iterdir()} == {
        "manifest.json",
        "tokenizer.model",
        "train.array_record",
        "validation.array_record",
        "validation.en.txt",
        "validation.de.txt",
        "test.array_record",
        "test.en.txt",
        "test.de.txt",
        "tfds",
        ".lock",
    }


def test_the_same_twice(config, tmp_path):
    made = []
    for name in ("one", "two"):
        config.dir = str(tmp_path / name)
        made.append(contents(prepare(config)))
    assert made[0] == made[1]


def test_language_model(config, text_dir, capsys):
    config.update(source="", source_length=0, vocab_size=281)
    config.splits.test = ""
    directory = prepare(config)
    assert sorted(texts(directory, "train")) == sorted(
        ("", german) for _, german in lines(text_dir, "train")
    )
    assert all(source == [] for row in rows(directory, "train") for source, _ in row)
    assert "%;" in (out := capsys.readouterr().out) and " and " not in out  # of one side alone
    assert read_lines(directory / "validation.de.txt") == read_lines(text_dir / "val.de")
    manifest = Manifest.read(directory)
    assert manifest.splits.keys() == {"train", "validation"}
    assert manifest.split("train").source_fill == 0
    assert not (directory / "validation..txt").exists()
    assert not list(directory.glob("test*"))


def test_prepared_data_is_found_again(config, capsys, caplog):
    prepare(config)
    before = {file: file.stat().st_mtime_ns for file in Path(config.dir).iterdir()}
    out = capsys.readouterr().out
    # What TFDS would say of a dataset that it has not seen, and that it downloads, is left out.
    assert "211 examples" in out and "ownload" not in out and not caplog.records
    assert prepare(config) == Path(config.dir)
    assert {file: file.stat().st_mtime_ns for file in Path(config.dir).iterdir()} == before
    assert capsys.readouterr().out == ""


def test_other_data_is_refused_field_by_field(config, text_dir):
    prepare(config)
    config.update(vocab_size=292, pack=False)
    config.splits.test = ""
    spoil(text_dir, "train", 3, "en", "one two")
    with pytest.raises(ValueError) as error:
        prepare(config)
    message = str(error.value)
    assert "  vocab_size: was 293, asked 292\n" in message
    assert "  pack: was True, asked False\n" in message
    assert "  splits.test: was 'test', asked None\n" in message
    assert "  files.test.en: was " in message and "  files.test.de: was " in message
    assert "  files.train.en: was " in message
    assert message.count("was") == 6
    assert "another --config.data.dir (--config.data.dir= picks a new one), or delete" in message
    assert "manifest.json to make it anew" in message
    (Path(config.dir) / "manifest.json").unlink()
    assert Manifest.read(prepare(config)).request["vocab_size"] == 292


def test_prepared_data_needs_no_raw_text(config, text_dir, tmp_path, capsys):
    """Prepared on one machine, trained on another."""
    prepare(config)
    text_dir.rename(tmp_path / "elsewhere")
    assert prepare(config) == Path(config.dir)
    assert f"{text_dir} is not here" in capsys.readouterr().out
    config.vocab_size = 292
    with pytest.raises(ValueError, match="vocab_size: was 293, asked 292"):
        prepare(config)


def test_interrupted_leaves_nothing_whole(config, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert {file.name for file in Path(config.dir).iterdir()} == {"tfds", ".lock"}
    with pytest.raises(ValueError, match="no .*manifest.json"):
        Manifest.read(config.dir)
    prepare(config)
    assert Manifest.read(config.dir).split("train").examples == 211


def test_killed_between_files_is_not_whole(config, monkeypatch):
    """The manifest is the last file to appear."""
    replaced = []
    replace = Path.replace

    def killed(self, target):
        if self.name == "manifest.json":
            raise KeyboardInterrupt
        replaced.append(self.name)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert len(replaced) == 8
    prepare(config)
    assert len(texts(Path(config.dir), "train")) == 211


def contents(directory):
    """The files, without the lock's."""
    return {path.name: path.read_bytes() for path in directory.glob("[!.]*") if path.is_file()}


def test_a_mixture_that_a_kill_left_is_made_whole(config):
    """Killed while files were replaced: some are old, some new, and no manifest."""
    directory = prepare(config)
    was = contents(directory)
    config.dir += "2"
    other = prepare(config)
    (other / "manifest.json").unlink()
    (other / "train.array_record").write_bytes(was["validation.array_record"])
    (other / "tokenizer.model").unlink()
    assert contents(prepare(config)) == was


def test_what_killed_preparations_left_is_removed(config):
    directory = prepare(config)
    builds = next((directory / "tfds/parallel_text").iterdir())
    shutil.rmtree(builds / "1.1.0")
    (directory / "manifest.json").unlink()
    left = directory / ".incomplete-x0y1z2", builds / "incomplete.QWERTZ_1.1.0"
    kept = directory / "incomplete-notes", directory / ".incomplete", builds / "1.0.0"
    for path in (*left, *kept):
        path.mkdir()
        (path / "train.array_record").write_bytes(b"half")
    prepare(config)
    assert [path.exists() for path in (*left, *kept)] == [False, False, True, True, True]


@pytest.mark.slow
def test_two_at_once_make_it_once(config, tmp_path):
    """The second waits for the first, and finds what it made."""
    (tmp_path / "data.json").write_text(json.dumps(config.to_dict()))
    script = (
        "import json, ml_collections, sys; from mqa_jax.data.prepare import prepare\n"
        "data = ml_collections.ConfigDict(json.load(open(sys.argv[1])))\n"
        "print('ready', flush=True); sys.stdin.readline(); prepare(data)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "data.json")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ends
    assert sorted("211 examples" in out for out, _ in ends) == [False, False, True]
    Manifest.read(config.dir).check_files(config.dir)


def spoil(text_dir, stem, number, side, text):
    content = read_lines(text_dir / f"{stem}.{side}")
    content[number - 1] = text
    (text_dir / f"{stem}.{side}").write_text("".join(line + "\n" for line in content))


@pytest.mark.parametrize("side", ["en", "de"])
@pytest.mark.parametrize("stem", ["train", "val"])
@pytest.mark.parametrize("text", ["", " \t\u00a0\r"])
def test_blank_line(config, text_dir, stem, side, text):
    spoil(text_dir, stem, 5, side, text)
    with pytest.raises(ValueError, match=rf"{stem}\.{side}:5: blank; .*on_invalid=drop"):
        prepare(config)


@pytest.mark.parametrize(
    "side, limit, field", [("en", 37, "source_length"), ("de", 41, "target_length")]
)
def test_long_line(config, text_dir, side, limit, field):
    spoil(text_dir, "val", 5, side, "☃" * limit)
    message = rf"val\.{side}:5: \d+ tokens, {limit} fit into a row; raise --config\.data\.{field}"
    with pytest.raises(ValueError, match=message):
        prepare(config)


@pytest.mark.parametrize("stem", ["train", "val"])
@pytest.mark.parametrize("side, length", [("en", 37), ("de", 41)])
def test_what_cannot_fit_never_comes_to_the_tokenizer(
    config, text_dir, monkeypatch, stem, side, length
):
    """A megabyte in one line is dropped as any long line is, or named at once."""
    spoil(text_dir, stem, 5, side, "a b " * 250_000)
    spoil(text_dir, stem, 6, side, "one " * (4 * (length - 1)))  # as many as 16 a piece allow
    seen = []

    class Spy(Tokenizer):
        @classmethod
        def train(cls, sentences, path, vocab_size):
            seen.extend(sentences)
            return Tokenizer.train(seen, path, vocab_size)

    monkeypatch.setattr(prepare_module, "Tokenizer", Spy)
    message = rf"{stem}\.{side}:5: 1,000,000 characters, {16 * (length - 1)} fit into a row; raise"
    with pytest.raises(ValueError, match=message):
        prepare(config)
    assert not seen or stem == "train" and len(seen) < 10
    seen.clear()
    config.on_invalid = "drop"
    manifest = Manifest.read(prepare(config))
    split = {"train": "train", "val": "validation"}[stem]
    assert manifest.split(split).dropped == {"too_long": 2}
    # The second line might have fitted, for all that its characters say.
    if stem == "train":
        assert max(map(len, seen)) == 16 * (length - 1)
    assert max(map(len, seen)) < 1000


def test_the_longest_line_fits(config, text_dir):
    """The limit counts EOS, and is itself allowed."""
    ids = Tokenizer.load(prepare(config) / "tokenizer.model").encode
    longest = max(len(ids(english)) for english, _ in lines(text_dir, "val"))
    config.update(source_length=longest, on_invalid="drop", dir=config.dir + "2")
    assert Manifest.read(prepare(config)).split("validation").dropped == {}
    config.update(source_length=longest - 1, dir=config.dir + "3")
    assert Manifest.read(prepare(config)).split("validation").dropped["too_long"] > 0


def test_invalid_examples_are_dropped_and_counted(config, text_dir, capsys):
    config.on_invalid = "drop"
    raw = lines(text_dir, "val")
    spoil(text_dir, "val", 2, "en", "")
    spoil(text_dir, "val", 3, "de", " ")
    spoil(text_dir, "val", 5, "de", "☃" * 41)
    directory = prepare(config)
    kept = [pair for number, pair in enumerate(raw, start=1) if number not in (2, 3, 5)]
    assert sorted(texts(directory, "validation")) == sorted(kept)
    assert read_lines(directory / "validation.de.txt") == [german for _, german in kept]
    stats = Manifest.read(directory).split("validation")
    assert stats.dropped == {"blank": 2, "too_long": 1}
    assert stats.examples == 10
    assert "10 examples" in (out := capsys.readouterr().out)
    assert "dropped: 2 blank, 1 too_long" in out


def test_a_split_without_examples_is_refused(config, text_dir):
    config.on_invalid = "drop"
    for side in ("en", "de"):
        (text_dir / f"test.{side}").write_text("\n\n\n")
    with pytest.raises(ValueError, match="no example is left of test, all 3 were dropped"):
        prepare(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(builder="no_such_dataset", path=""), "no_such_dataset"),
        (dict(builder="lm1b", path=""), "lm1b/.* takes TensorFlow: .*mqa_jax.prepare"),
        (dict(builder="wmt14_translate/de-en", path=""), "wmt14_translate/.* takes TensorFlow"),
    ],
)
def test_datasets_that_cannot_be_had(config, monkeypatch, changes, message):
    monkeypatch.setattr(raw_module.importlib.util, "find_spec", lambda name: None)
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        prepare(config)
    assert {path.name for path in Path(config.dir).iterdir()} == {".lock"}


class FewWords(tfds.core.GeneratorBasedBuilder):
    """A dataset as TFDS has them: shuffled, its splits named at will, its lines not numbered."""

    VERSION = tfds.core.Version("1.0.0")
    WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"up": text, "down": text})
        )

    def _split_generators(self, dl_manager):
        return {"big": self._generate_examples(200), "small": self._generate_examples(20)}

    def _generate_examples(self, count):
        for i in range(count):
            text = " ".join(self.WORDS[i % 8] for i in range(i % 11, i % 11 + i % 5 + 1))
            yield i, {"up": text.upper(), "down": text + "\n" * (count == 20 and i == 7)}


@pytest.fixture
def few_words(config, monkeypatch):
    config.update(builder="few_words", path="", source="up", target="down", vocab_size=307)
    config.splits = dict(train="big[10%:]", validation="big[:10%]")
    options = dict(data_dir=str(Path(config.dir) / "tfds"), file_format="array_record")
    FewWords(**options).download_and_prepare()
    return config


def test_any_tfds_dataset(few_words, monkeypatch):
    """One that is built needs no TensorFlow; slices of splits are splits."""
    monkeypatch.setattr(raw_module, "READ_AT_ONCE", 7)
    directory = prepare(few_words)
    assert len(texts(directory, "train")) == 180
    assert len(texts(directory, "validation")) == 20
    assert all(up.lower() == down for up, down in texts(directory, "train"))


def test_tfds_features_and_splits_are_checked(few_words):
    few_words.target = "sideways"
    with pytest.raises(
        ValueError, match=r"few_words has no texts \['sideways'\], only \['down', 'up'\]"
    ):
        prepare(few_words)
    few_words.target = "down"
    few_words.splits.validation = "huge"
    with pytest.raises(ValueError, match="huge"):
        prepare(few_words)


def test_line_breaks_would_shift_the_text_files(few_words):
    few_words.splits.validation = "small"
    with pytest.raises(ValueError, match=r"few_words/1.0.0, small\[\d+\], 'down': .* line break"):
        prepare(few_words)


def test_invalid_examples_of_tfds_are_named(few_words):
    few_words.source_length = 5
    place = r"few_words/1.0.0, big\[10%:\]\[\d+\], 'up'"
    with pytest.raises(ValueError, match=rf"{place}: \d+ tokens, 5 fit"):
        prepare(few_words)


def test_command_line(config, tmp_path):
    """Nothing on the way imports TensorFlow."""
    fields = config.to_dict() | {"vocab_size": 0}
    (tmp_path / "asked.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(variant): return ConfigDict(dict(data={fields!r}, variant=variant))\n"
    )
    script = (
        "import runpy, sys\n"
        f"sys.argv[1:] = ['--config={tmp_path}/asked.py:any', '--config.data.vocab_size=293']\n"
        "try:\n"
        "    runpy.run_module('mqa_jax.data.prepare', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as exit:\n"
        "    print(exit.code, 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("None False\n"), done
    assert "211 examples" in done.stdout
    assert Manifest.read(config.dir).request["vocab_size"] == 293


def test_no_module_imports_jax_or_tensorflow():
    for file in Path(mqa_jax.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])]
            names.append(getattr(node, "module", None) or "")
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"jax", "flax", "tensorflow"}, file


def test_importing_the_package_is_cheap():
    tree = ast.parse(Path(mqa_jax.data.__file__).read_text())
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imported] == ["typing", "mqa_jax.core.extras"]


def test_manifest_is_json_of_the_request(config):
    directory = prepare(config)
    request = json.loads((directory / "manifest.json").read_text())["request"]
    assert request["format"] == FORMAT
    assert request["splits"] == {"train": "train", "validation": "val", "test": "test"}
    assert request["files"].keys() == {
        f"{stem}.{side}" for stem in ("train", "val", "test") for side in ("en", "de")
    }
    assert "path" not in request and "dir" not in request


def test_parts_of_one_file_are_splits(config, text_dir):
    config.splits.update(train="train[:90%]", validation="train[90%:95%]", test="train[95%:]")
    directory = prepare(config)
    found = [pair for split in ("validation", "test") for pair in texts(directory, split)]
    assert sorted(found) == sorted(lines(text_dir, "train")[190:])
    assert len(texts(directory, "validation")) == 10
    assert Manifest.read(directory).splits["train"].examples == 190


def test_what_is_wrong_with_a_part_of_a_file_is_named_with_its_line(config, text_dir):
    config.splits.update(train="train[:90%]", validation="train[90%:]", test="")
    path = text_dir / "train.de"
    whole = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([*whole[:199], "", *whole[200:]]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.de:200: blank"):
        prepare(config)


@pytest.mark.parametrize(
    "splits, message",
    [
        (dict(train="train[:90%]", validation="train[80%:]"), r"validation 'train\[80%:\]' and "),
        (dict(train="train", validation="train[99%:]"), "have examples in common"),
        (dict(train="train[:90%]", validation="train[-500:]"), "Give a split"),
        (dict(train="train[:90%]", validation="train[ninety:]"), r"validation 'train\[ninety"),
        (dict(train="train[:90%]", validation="train["), r"splits\.validation 'train\['"),
    ],
)
def test_parts_that_cannot_be_are_refused(config, splits, message):
    config.splits.update(splits, test="")
    with pytest.raises(ValueError, match=message):
        prepare(config)


def test_training_text_is_written_again_in_other_pieces(config, text_dir, tmp_path):
    once = prepare(config)
    config.update(dir=str(tmp_path / "sampled"), subword_samples=3, subword_alpha=0.1)
    sampled = prepare(config)
    assert sorted(texts(sampled, "train")) == sorted(3 * lines(text_dir, "train"))
    ways = {tuple(target) for row in rows(sampled, "train") for _, target in row}
    assert len(ways) > 1.5 * len(
        {tuple(target) for row in rows(once, "train") for _, target in row}
    )
    for name in ("validation.array_record", "test.array_record", "tokenizer.model"):
        assert (sampled / name).read_bytes() == (once / name).read_bytes()
    config.dir = str(tmp_path / "again")
    again = prepare(config)
    assert (again / "train.array_record").read_bytes() == (
        sampled / "train.array_record"
    ).read_bytes()


def test_pieces_that_a_row_has_no_room_for_are_not_taken(config, text_dir, tmp_path):
    config.update(on_invalid="drop", source_length=9, target_length=9)
    once = Manifest.read(prepare(config)).splits["train"]
    config.update(dir=str(tmp_path / "sampled"), subword_samples=2, subword_alpha=0.01)
    sampled = Manifest.read(prepare(config)).splits["train"]
    assert once.dropped and sampled.dropped == once.dropped
    assert sampled.examples == 2 * once.examples


def test_other_samples_are_other_data(config):
    config.update(subword_samples=2)
    prepare(config)
    config.update(subword_alpha=0.4)
    with pytest.raises(ValueError, match="subword_alpha: was 0.3, asked 0.4"):
        prepare(config)


def test_a_tokenizer_of_others_is_not_sampled(config):
    with pytest.raises(ValueError, match="subword_samples=2: the tokenizer of --config.init_from"):
        prepare(ConfigDict(config.to_dict() | dict(subword_samples=2)), object())

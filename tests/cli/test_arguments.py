"""What a command line is taken to mean, and how a mistake in it ends: in one line, and status 2."""

import re

import pytest

from mqa_jax.cli import COMMANDS, PACKAGE, explain, main
from mqa_jax.cli.arguments import find_config, load_config

# As ml_collections imports a config.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

WORKDIR = "--workdir=x"
MISTAKES = {
    "": ["foo"],
    "train, decode, evaluate, convert, quantize, export, benchmark, prepare": ["foo"],
    "give --workdir, of a training run, or --model, of the hub, to decode with": ["decode"],
    "--dtype: of no effect without --model": ["decode", WORKDIR, "--dtype=bfloat16"],
    "--step, --average: of no effect without --workdir": [
        "decode",
        "--model=x",
        "--step=1",
        "--average=2",
    ],
    "--step must be the number of a step, or best, not '-1'": ["decode", WORKDIR, "--step=-1"],
    "--average must be at least 1, not 0": ["decode", WORKDIR, "--average=0"],
    "--temperature: of no effect without --sample": ["decode", WORKDIR, "--temperature=1"],
    "--top_k, --seed: of no effect": ["decode", WORKDIR, "--seed=0", "--top_k=2"],
    "--alpha: of no effect without a --beam_size": ["decode", WORKDIR, "--alpha=1"],
    "--sample and --beam_size exclude": ["decode", WORKDIR, "--sample", "--beam_size=2"],
    "--alpha must be a finite number, not nan": ["decode", WORKDIR, "--beam_size=2", "--alpha=nan"],
    "--temperature must be": ["decode", WORKDIR, "--sample", "--temperature=nan"],
    "--top_p must be": ["decode", WORKDIR, "--sample", "--top_p=1.5"],
    "--top_k must be": ["decode", WORKDIR, "--sample", "--top_k=0"],
    "--min_p must be": ["decode", WORKDIR, "--sample", "--min_p=0"],
    "--min_p: of no effect without --sample": ["decode", WORKDIR, "--min_p=0.1"],
    "--beam_rules, --n_best: of no effect without a": [
        "decode",
        WORKDIR,
        "--n_best=2",
        "--beam_rules=transformers",
    ],
    "--n_best=3 is more than there are with --beam_size=2": [
        "decode",
        WORKDIR,
        "--beam_size=2",
        "--n_best=3",
    ],
    "--n_best and --on_long=split exclude": [
        "decode",
        WORKDIR,
        "--beam_size=2",
        "--n_best=2",
        "--on_long=split",
    ],
    "--n_best and --reference exclude": [
        "decode",
        WORKDIR,
        "--beam_size=2",
        "--n_best=2",
        "--reference=y",
    ],
    "--repetition_penalty must be": ["decode", WORKDIR, "--repetition_penalty=0"],
    "--no_repeat_ngram must be from 1": ["decode", WORKDIR, "--no_repeat_ngram=0"],
    "--min_new_tokens must be from 0": ["decode", WORKDIR, "--min_new_tokens=-1"],
    "--stop must be a string that is not empty": ["decode", WORKDIR, "--stop="],
    "--score needs --reference": ["decode", WORKDIR, "--score"],
    "--beam_size, --stop: of no effect with --score": [
        "decode",
        WORKDIR,
        "--score",
        "--reference=y",
        "--stop=a",
        "--beam_size=2",
    ],
    "--seed must be": ["decode", WORKDIR, "--sample", "--seed=-1"],
    "--batch_size must be": ["decode", WORKDIR, "--batch_size=0"],
    "--batch_size=two": ["decode", WORKDIR, "--batch_size=two"],
    "--beam_size must be": ["decode", WORKDIR, "--beam_size=0"],
    "--max_new_tokens must be from 1": ["decode", WORKDIR, "--max_new_tokens=0"],
    "not -1": ["decode", WORKDIR, "--max_new_tokens=-1"],
    "<error|skip|cut|split>": ["decode", WORKDIR, "--on_long=trim"],
    "--variants is a flag of `mqa-jax benchmark`": ["decode", WORKDIR, "--variants=multi_query"],
    "did you mean --temperature?": ["decode", WORKDIR, "--sample", "--temprature=1"],
    "decode has no flag --foo": ["decode", WORKDIR, "--foo"],
    "'text' means nothing": ["decode", WORKDIR, "text"],
    "cannot both be standard input": ["decode", WORKDIR, "--reference=-"],
    "--beam_size is a flag of `mqa-jax decode`": ["decode", "--benchmark", "--beam_size=2"],
    "give --config": ["decode", "--benchmark"],
    "give --output_dir": ["benchmark", "--config=quickstart"],
    "--output_dir 'gs://a/b' is an address": [
        "benchmark",
        "--config=quickstart",
        "--output_dir=gs://a/b",
    ],
    "--workdir 'gs://a/b' is an address": ["decode", "--workdir=gs://a/b"],
    "--workdir 's3://a/b' is an address": ["train", "--config=quickstart", "--workdir=s3://a/b"],
    "--repeats: of no effect with --compile_only": [
        "decode",
        "--config=quickstart",
        "--repeats=2",
        "--compile_only=v5e:2x2",
    ],
    "--batch_sizes must be at least 1, not 0": [
        "benchmark",
        "--config=quickstart",
        "--output_dir=x",
        "--batch_sizes=2,0",
    ],
    "dtype must be a floating-point type, such as float32, bfloat16 or float16, not 'fp16'": [
        "benchmark",
        "--config=quickstart",
        "--output_dir=x",
        "--config.model.dtype=fp16",
    ],
    "there is no config 'configs/wmt41.py': give": ["train", WORKDIR, "--config=configs/wmt41.py"],
    "lm1b, multi30k, own_language_model, quickstart, uptrain, wmt14": [
        "train",
        "--config=wmt",
        WORKDIR,
    ],
    "there is no config ''": ["train", WORKDIR, "--config="],
    "Missing value for flag --config": ["train", WORKDIR, "--config"],
    "wmt14.py: variant 'foo' is not one of": ["train", WORKDIR, "--config=wmt14:foo"],
    "config.model has no 'widow'; it has ": [
        "train",
        WORKDIR,
        "--config=wmt14",
        "--config.model.widow=1",
    ],
    "config has no 'modl'; it has data, ": [
        "prepare",
        "--config=wmt14",
        "--config.modl.window=1",
    ],
    "--config.train.steps=1.5": ["train", WORKDIR, "--config=wmt14", "--config.train.steps=1.5"],
    "--config.model.window needs a --config": ["train", "--config.model.window=3", WORKDIR],
    "before a value for --config": ["train", "--config.model.window=3", "--config=wmt14", WORKDIR],
    "'steps=3' means nothing": ["train", WORKDIR, "--config=wmt14", "steps=3"],
    "--workdir: of no effect with --compile_only": [
        "train",
        "--config=wmt14",
        "--compile_only=v5e:2x2",
        WORKDIR,
    ],
    "--peer_timeout: of no effect": ["train", "--config=wmt14", "--peer_timeout=3", WORKDIR],
    "give --workdir to train": ["train", "--config=wmt14"],
    "give --config, such as": ["prepare"],
}


@pytest.mark.parametrize(("message", "args"), MISTAKES.items(), ids=str)
def test_a_mistake_is_told_in_one_line(message, args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and re.fullmatch(r"error: .*\n", errors) and message in errors
    assert list(tmp_path.iterdir()) == [], "nothing is begun"


SAID = {"raise ValueError('said')": 2, "raise RuntimeError('said')": 1, "open('/nowhere/x')": 2}
BUGS = ["int('x')", "a, = []", "import json; json.loads('')", "raise KeyError('said')", "import no"]


@pytest.mark.parametrize("source", [*SAID, *BUGS, "raise KeyboardInterrupt"])
def test_what_we_say_is_told_and_a_bug_keeps_its_traceback(source, capsys):
    try:
        exec(compile(source, PACKAGE / "somewhere.py", "exec"), {})
    except BaseException as error:
        if source in BUGS:
            with pytest.raises(type(error)) as caught:
                explain(error)
            assert caught.value is error
        else:
            assert explain(error) == SAID.get(source, 130)
    errors = capsys.readouterr().err
    if source in SAID:
        assert errors in ("error: said\n", "error: /nowhere/x: No such file or directory\n")
    else:
        assert errors == ("" if source in BUGS else "interrupted\n")


def test_an_error_of_the_same_kind_from_elsewhere_is_a_bug():
    with pytest.raises(ValueError, match="said") as caught:
        raise ValueError("said")
    with pytest.raises(ValueError, match="said"):
        explain(caught.value)


def test_help_is_of_this_command_alone(capsys):
    assert main(["--help"]) == 0 and main([]) == 0
    assert all(f"  {name} " in capsys.readouterr().out for name in [*COMMANDS][:1])
    flags = {}
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 100
        flags[name] = set(re.findall(r"^  --(\w+)", printed, re.MULTILINE))
    assert {"workdir", "beam_size", "on_long"} < flags["decode"] and len(flags["decode"]) < 35
    assert flags["prepare"] == {"config"}
    assert "workdir" not in flags["benchmark"]
    assert main(["decode", "--benchmark", "--help"]) == 0
    assert "--variants" in capsys.readouterr().out


def test_a_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.py", "configs/quickstart.py", "configs/quickstart"):
        config = load_config(f"{name}:multi_head", {"train.steps": 3})
        assert config.model.num_kv_heads == 4 and config.train.steps == 3
    # One that is here comes first.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quickstart.py").write_text("")
    assert find_config("configs/quickstart.py:a:b") == "configs/quickstart.py:a:b"
    with pytest.raises(ValueError, match="there is no config 'other/quickstart.py'"):
        find_config("other/quickstart.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return nme\n", "own.py:2: NameError: name 'nme'"),
        ("def get_config(:\n", "own.py: SyntaxError: "),
        ("import nowhere\n", "own.py:1: ModuleNotFoundError: "),
        ("x = 1\n", "own.py has no function get_config"),
        ("def get_config():\n    return 3\n", "own.py has no function get_config"),
        ("def get_config():\n    raise ValueError('no such size')\n", "own.py: no such size"),
        ("def get_config(a):\n    pass\n", "own.py needs a variant behind a :"),
    ],
)
def test_a_wrong_config_of_ones_own_is_named_with_its_line(text, message, tmp_path):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(str(tmp_path / "own.py"))


def test_a_variant_for_a_config_without_any(tmp_path):
    (tmp_path / "own.py").write_text("def get_config():\n    pass\n")
    with pytest.raises(ValueError, match="own.py takes no variant, such as 'x'"):
        load_config(f"{tmp_path}/own.py:x")

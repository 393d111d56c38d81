"""The tokenizers of the hub: their rules, odd text there and back, and files that are broken."""

import io
import json
import zipfile

import pytest
import sentencepiece
import tokenizers
from checkpoints import write, write_words
from hypothesis import given, settings
from hypothesis import strategies as st

from mqa_jax.hub import load, load_tokenizer, save
from mqa_jax.hub.row_tokenizer import HubRowTokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "Forty-two is the answer; what was the question?",
    "def f(x): return x * 2  # twice",
] * 3
ODD = [
    "",
    " ",
    "  two  spaces ",
    "\n\t",
    "naïve café",
    "日本語",
    "🦊🦊",
    "a\u0301",
    "\u200b",
    "\x00",
]


def pieces(vocab_size=330, **options) -> bytes:
    """A SentencePiece model that keeps every character."""
    model = io.BytesIO()
    options = dict(pad_id=-1, unk_id=0, bos_id=1, eos_id=2) | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def llama_pieces():
    return pieces(normalization_rule_name="identity", remove_extra_whitespaces=False)


@pytest.fixture(scope="module")
def t5_pieces():
    return pieces(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def byte_level(begin: bool = False) -> tokenizers.Tokenizer:
    """As of GPT-2, and with a token in front as of Llama 3."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if begin:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return tokenizer


def put(directory, **files):
    """A directory with these files, `__` for the dot in their names."""
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        (directory / name.replace("__", ".")).write_bytes(content)
    return directory


def test_a_tokenizer_json_says_everything(tmp_path):
    own = byte_level(begin=True)
    own.enable_truncation(4)
    own.enable_padding(length=16)
    put(tmp_path, tokenizer__json=own.to_str(), tokenizer__model=b"not looked at")
    tokenizer = load_tokenizer(tmp_path, "llama")
    assert (tokenizer.begin_ids, tokenizer.end_ids) == ((1,), ())
    assert tokenizer.vocab_size == own.get_vocab_size()
    for text in SENTENCES + ODD:
        ids = tokenizer.encode(text)
        assert ids[0] == 1 and len(ids) >= len(text.split())
        assert tokenizer.decode(ids) == text
    # What is special is left out, and text that looks like it is what the file says.
    assert tokenizer.decode([1, *tokenizer.encode("fox")[1:], 0, 0]) == "fox"
    assert tokenizer.encode("<|endoftext|>") == [1, 0]


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tmp_path_factory, text):
    directory = put(tmp_path_factory.mktemp("any"), tokenizer__json=byte_level().to_str())
    tokenizer = load_tokenizer(directory, "gpt2")
    assert (tokenizer.begin_ids, tokenizer.end_ids) == ((), ())
    special = any(token in text for token in ("<|endoftext|>", "<s>"))
    assert special or tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_has_two_files(tmp_path):
    own = byte_level()
    own.model.save(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path, "gpt2")
    for text in SENTENCES + ODD:
        assert tokenizer.encode(text) == own.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|endoftext|>") == [0]
    assert tokenizer.decode([0, *tokenizer.encode("fox")]) == "fox"
    # Others cut text in another way before they merge, which these files do not say.
    assert load_tokenizer(tmp_path, "qwen2") is None


@pytest.mark.parametrize(
    ("options", "begin", "end"),
    [
        ({}, (1,), ()),
        (dict(add_bos_token=False), (), ()),
        (dict(add_bos_token=True, add_eos_token=True), (1,), (2,)),
    ],
)
def test_a_sentencepiece_model_begins_with_its_id(tmp_path, llama_pieces, options, begin, end):
    put(tmp_path, tokenizer__model=llama_pieces, tokenizer_config__json=json.dumps(options))
    tokenizer = load_tokenizer(tmp_path, "gemma")
    assert (tokenizer.begin_ids, tokenizer.end_ids) == (begin, end)
    model = sentencepiece.SentencePieceProcessor(model_proto=llama_pieces)
    for text in SENTENCES + ODD[:-1]:
        ids = tokenizer.encode(text)
        assert ids == [*begin, *model.encode(text), *end]
        assert tokenizer.decode(ids) == text


def test_t5_ends_with_its_id_and_has_sentinels_behind_its_pieces(tmp_path, t5_pieces):
    put(tmp_path, spiece__model=t5_pieces)
    tokenizer = load_tokenizer(tmp_path, "t5")
    model = sentencepiece.SentencePieceProcessor(model_proto=t5_pieces)
    size = model.vocab_size()
    assert tokenizer.vocab_size == size + 100
    assert tokenizer.encode("The fox") == [*model.encode("The fox"), 1]
    found = tokenizer.encode("The<extra_id_0>fox<extra_id_99>")
    assert found == [*model.encode("The"), size + 99, *model.encode("fox"), size, 1]
    assert tokenizer.decode(found) == "The fox"
    # No sentinel: the model's own pieces.
    assert max(tokenizer.encode("<extra_id_100>")) < size
    put(tmp_path, tokenizer_config__json='{"extra_ids": 0}')
    tokenizer = load_tokenizer(tmp_path, "t5")
    assert tokenizer.vocab_size == size and max(tokenizer.encode("<extra_id_0>")) < size


def test_tokens_that_are_no_pieces_are_not_taken_to_pieces(tmp_path, llama_pieces):
    """Those of the model's own, and those that other files add; in text, and back."""
    put(tmp_path, tokenizer__model=llama_pieces)
    model = sentencepiece.SentencePieceProcessor(model_proto=llama_pieces)
    size = model.vocab_size()
    tokenizer = load_tokenizer(tmp_path, "llama")
    assert tokenizer.encode("The</s> fox") == [1, *model.encode("The"), 2, *model.encode(" fox")]
    put(tmp_path, added_tokens__json=json.dumps({"<|end|>": size + 2, "[PAD]": size}))
    put(tmp_path, special_tokens_map__json=json.dumps(dict(pad_token="[PAD]")))
    tokenizer = load_tokenizer(tmp_path, "llama")
    assert tokenizer.vocab_size == size + 3
    ids = tokenizer.encode("The[PAD]<|end|>fox")
    assert ids == [1, *model.encode("The"), size, size + 2, *model.encode("fox")]
    # The space that is put in front of a text is left out in front of all of it alone.
    assert tokenizer.decode(ids) == "The<|end|> fox"
    # Where a newer file has them, the older one is not looked at.
    kinds = {str(size + 5): dict(content="<x>", lstrip=True, rstrip=True, special=False)}
    put(tmp_path, tokenizer_config__json=json.dumps(dict(added_tokens_decoder=kinds)))
    tokenizer = load_tokenizer(tmp_path, "llama")
    assert tokenizer.vocab_size == size + 6
    found = tokenizer.encode("The <x> fox")
    assert found == [1, *model.encode("The"), size + 5, *model.encode("fox")]


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt"])
def test_tokens_beside_a_vocabulary_are_tokens(tmp_path, name):
    own = byte_level()
    if name == "merges.txt":
        own.model.save(str(tmp_path))
    else:
        put(tmp_path, tokenizer__json=own.to_str())
    size = load_tokenizer(tmp_path, "gpt2").vocab_size
    plain = load_tokenizer(tmp_path, "gpt2").encode("The fox")
    kinds = {str(size): dict(content="<|end|>", special=True), str(size + 1): dict(content="<x>")}
    options = dict(added_tokens_decoder=kinds, additional_special_tokens=["<y>", "<|end|>"])
    put(tmp_path, tokenizer_config__json=json.dumps(options))
    tokenizer = load_tokenizer(tmp_path, "gpt2")
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.encode("<y>The fox<x><|end|>") == [size + 2, *plain, size + 1, size]
    assert tokenizer.decode([*plain, size + 1, size, size + 2]) == "The fox<x>"
    kinds[str(size + 9)] = kinds.pop(str(size + 1))
    put(tmp_path, tokenizer_config__json=json.dumps(options))
    with pytest.raises(ValueError, match=f"'<x>' is said to have the id {size + 9} in another"):
        load_tokenizer(tmp_path, "gpt2")


def test_gpt2_begins_as_its_options_say(tmp_path):
    own = byte_level()
    own.model.save(str(tmp_path))
    options = dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=True, add_bos_token=True)
    put(tmp_path, tokenizer_config__json=json.dumps(options))
    tokenizer = load_tokenizer(tmp_path, "gpt2")
    assert tokenizer.begin_ids == (0,)
    assert tokenizer.encode("The fox") == [0, *own.encode(" The fox").ids]
    put(tmp_path, tokenizer__json=own.to_str())
    assert load_tokenizer(tmp_path, "gpt2").encode("The fox") == own.encode(" The fox").ids


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<x>": "7"}),
        ("added_tokens.json", {"<x>": -1}),
        ("tokenizer_config.json", dict(added_tokens_decoder={"7": "<x>"})),
        ("tokenizer_config.json", dict(added_tokens_decoder={"x": dict(content="<x>")})),
    ],
)
def test_what_is_no_token_is_named(tmp_path, name, content):
    put(tmp_path, tokenizer__json=byte_level().to_str())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path, "gpt2")


@pytest.fixture
def marian(tmp_path, t5_pieces, llama_pieces):
    model = sentencepiece.SentencePieceProcessor(model_proto=t5_pieces)
    # Other ids than the model's, and fewer pieces.
    known = [model.id_to_piece(i) for i in range(3, model.vocab_size())][::-1]
    known = [piece for piece in known if "(" not in piece]
    vocabulary = {"</s>": 0, "<unk>": 1, ">>deu<<": 2}
    vocabulary |= {piece: i for i, piece in enumerate(known, start=3)}
    vocabulary["<pad>"] = len(vocabulary)
    return put(
        tmp_path,
        source__spm=t5_pieces,
        target__spm=t5_pieces,
        vocab__json=json.dumps(vocabulary),
    )


def test_marians_ids_are_those_of_its_vocabulary(marian, t5_pieces):
    tokenizer = load_tokenizer(marian, "marian")
    vocabulary = json.loads((marian / "vocab.json").read_text())
    model = sentencepiece.SentencePieceProcessor(model_proto=t5_pieces)
    found = tokenizer.encode("The fox")
    assert found == [*(vocabulary.get(p, 1) for p in model.encode("The fox", out_type=str)), 0]
    assert found[:-1] != model.encode("The fox")
    assert tokenizer.vocab_size == len(vocabulary) and tokenizer.end_ids == (0,)
    for text in SENTENCES[:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 1 in tokenizer.encode(SENTENCES[3])
    # What comes out is of the other file's pieces.
    (marian / "target.spm").write_bytes(pieces(302, pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    both = load_tokenizer(marian, "marian")
    own = sentencepiece.SentencePieceProcessor(model_file=str(marian / "target.spm"))
    target = [vocabulary.get(p, 1) for p in own.encode("The fox", out_type=str)]
    assert both.encode_target("The fox") == [*target, 0] != both.encode("The fox") == found
    # A language in front is one token, any other such text is text.
    assert tokenizer.encode(">>deu<< The fox") == [2, *found]
    assert tokenizer.encode(">>fra<< The fox")[0] != 2
    silent = [vocabulary["<pad>"], 1, *found, vocabulary["<pad>"]]
    assert tokenizer.decode(silent) == "The fox"


def test_a_directory_without_a_tokenizer_has_none(tmp_path, llama_pieces):
    assert load_tokenizer(tmp_path, "llama") is None
    put(tmp_path, source__spm=llama_pieces, tokenizer__json="{}")
    assert load_tokenizer(tmp_path, "marian") is None


def test_ids_and_text_that_are_none_are_refused(tmp_path):
    put(tmp_path, tokenizer__json=byte_level().to_str())
    tokenizer = load_tokenizer(tmp_path, "gpt2")
    for id in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {id} is not in the vocabulary, 0 to"):
            tokenizer.decode([5, id])
    with pytest.raises(ValueError, match="is no text"):
        tokenizer.encode("half \ud800")


BROKEN = {
    "tokenizer.json": [b"", b"{}", b"[1]", b"\xff", b'{"model": {"type": "BPE"}}', b"[" * 99_999],
    "tokenizer.model": [b"", b"no model", b"\x00" * 100],
    "spiece.model": [b"", b"\xff" * 10],
    "tokenizer_config.json": [b"", b"[]", b'{"extra_ids": -1}', b'{"extra_ids": "many"}'],
    "vocab.json": [
        b"",
        b"[]",
        b"{}",
        b'{"<unk>": -1, "</s>": 0}',
        b'{"<unk>": "1", "</s>": 0}',
        b'{"<unk>": 1, "</s>": 0, "a": 1}',
    ],
    "source.spm": [b"", b"no model"],
    "target.spm": [b"", b"no model"],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name in BROKEN for content in BROKEN[name]]
)
def test_a_broken_file_is_named(marian, llama_pieces, name, content):
    is_marian = name in ("vocab.json", "source.spm", "target.spm")
    if name == "tokenizer_config.json":
        put(marian, spiece__model=llama_pieces)
    (marian / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_tokenizer(marian, "marian" if is_marian else "t5")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_works(tmp_path_factory, llama_pieces, data):
    """Whatever bytes change: a ValueError when it is read, or ids and text."""
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer.model"]))
    content = byte_level(begin=True).to_str().encode() if name.endswith("json") else llama_pieces
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    directory = tmp_path_factory.mktemp("damaged")
    (directory / name).write_bytes(changed)
    try:
        tokenizer = load_tokenizer(directory, "llama")
    except ValueError:
        return
    assert isinstance(tokenizer.decode(tokenizer.encode("The fox")), str)


def test_it_is_loaded_with_the_model_and_saved_again(tmp_path):
    directory = write(tmp_path / "given", "llama")
    put(directory, tokenizer__json=byte_level(True).to_str(), tokenizer_config__json="{}")
    put(directory, chat_template__jinja="{{ messages }}")
    pretrained = load(directory)
    save(tmp_path / "saved", pretrained)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "saved" / name).read_bytes() == (directory / name).read_bytes()
    again = load(tmp_path / "saved").tokenizer
    assert again.encode("The fox") == pretrained.tokenizer.encode("The fox")
    assert again.sha256 == pretrained.tokenizer.sha256
    (directory / "tokenizer_config.json").write_text('{"a": 1}')
    assert load(directory).tokenizer.sha256 != again.sha256


LETTERS = {"<s>": 0, "</s>": 1, "C": 2, "G": 3, "T": 4}


def letters(tmp_path, template="<s> $A </s>", **options):
    """A tokenizer of the letters of DNA but one, which has no id."""
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(LETTERS, **options))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    put(tmp_path, tokenizer__json=own.to_str())
    return load_tokenizer(tmp_path, "llama")


@pytest.mark.parametrize("template", ["<s> $A </s>", "<s> $A", "$A </s>", "$A"])
@pytest.mark.parametrize("unknown", ["<s>", "</s>", None])
def test_what_is_around_a_text_is_no_part_of_it(tmp_path, template, unknown):
    """Though an unknown letter has the same id, or none at all."""
    options = {} if unknown is None else dict(unk_token=unknown)
    tokenizer = letters(tmp_path, template, **options)
    begin, end = (0,) * template.startswith("<"), (1,) * template.endswith(">")
    assert (tokenizer.begin_ids, tokenizer.end_ids) == (begin, end)
    assert tokenizer.encode("CGT") == [*begin, 2, 3, 4, *end]


def test_a_text_that_the_library_fails_at_is_named(tmp_path):
    tokenizer = letters(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer fails at the text 'CAT': .*[Mm]issing"):
        tokenizer.encode("CAT")


@pytest.mark.parametrize(
    ("name", "template", "bos", "encoded"),
    [("gpt2", None, None, [3, 0, 4]), ("gpt2", "w1 $A", 1, [3, 0, 4]),
     ("gpt2", "w1 w1 $A w1", 1, [1, 3, 0, 4]), ("t5", "w1 $A w1", 0, [1, 3, 0, 4])],
)  # fmt: skip
def test_rows_begin_with_what_prompts_begin_with(tmp_path, name, template, bos, encoded):
    """What is decoded is then what was trained."""
    write_words(write(tmp_path, name, eos_token_id=4, pad_token_id=0), template)
    tokenizer = HubRowTokenizer.of(tmp_path)
    assert tokenizer.ids == (-1, bos, 4)
    assert tokenizer.encode("w3 w0") == encoded
    assert tokenizer.encode_target("w3 w0") == (encoded[1:] if name == "t5" else encoded)
    prompt = [*([] if bos is None or name == "t5" else [bos]), *encoded[:-1]]
    theirs = load_tokenizer(tmp_path, name)
    assert prompt == theirs.encode("w3 w0")[: -len(theirs.end_ids) or None]


def test_a_panic_of_the_library_is_a_broken_file(tmp_path):
    write_words(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    single = [{"Sequence": {"id": "B", "type_id": 0}}]
    content["post_processor"] = dict(
        type="TemplateProcessing", single=single, pair=[], special_tokens={}
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer that can be read"):
        load_tokenizer(tmp_path, "llama")


def test_the_library_counts_its_tokens_once(tmp_path):
    """It makes a dict of all of them, which takes as long as to decode a text."""

    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer, self.asked = tokenizer, []

        def __getattr__(self, name):
            self.asked.append(name)
            return getattr(self.tokenizer, name)

    tokenizer = load_tokenizer(write_words(tmp_path), "llama")
    tokenizer._tokenizer = counting = Counting(tokenizer._tokenizer)
    # What is around a text is found without them.
    assert tokenizer._around() == ((), ()) and set(counting.asked) == {"encode"}
    for _ in range(2):
        assert tokenizer.decode([3, 5, 30]) == "w3 w5 w30"
    assert counting.asked.count("get_vocab") <= 1


@pytest.mark.parametrize("at", range(40, 100, 20))
def test_a_damaged_archive_is_none(at):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps({f"key {i}": i * i for i in range(99)}))
    content = bytearray(packed.getvalue())
    content[at : at + 9] = b"\xff" * 9
    with pytest.raises(ValueError, match="bytes that are no zip file"):
        HubRowTokenizer(bytes(content))

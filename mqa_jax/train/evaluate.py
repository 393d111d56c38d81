"""The figures of the validation split, and what figures of any text are made of."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mqa_jax.data import loader
from mqa_jax.data.manifest import Manifest
from mqa_jax.data.text import read_lines
from mqa_jax.data.tokenizer import RowTokenizer
from mqa_jax.decode.lines import LineDecoder
from mqa_jax.decode.rules import only_text
from mqa_jax.decode.search import greedy
from mqa_jax.model.transformer import Model
from mqa_jax.train.loss import Batch, Metrics, mean_metrics
from mqa_jax.train.metrics import bleu, chrf, exact_match
from mqa_jax.train.processes import put_batch, row_share
from mqa_jax.train.step import make_eval_step


def add_up(sums: Sequence[Metrics]) -> dict[str, np.float64]:
    """Sums of batches, on the host, to those of all: in float64, as a split has many tokens."""
    return {name: np.sum([one[name] for one in sums], dtype=np.float64) for name in sums[0]}


def sums_of(
    eval_step: Callable[[nnx.State, Batch], Metrics],
    params: nnx.State,
    mesh: Mesh,
    batches: Iterable[Mapping[str, np.ndarray]],
) -> list[Metrics]:
    """The sums of each batch, on the host, of which this process has its rows."""
    return jax.device_get([eval_step(params, put_batch(mesh, batch)) for batch in batches])


def translate(decoder: LineDecoder, params: nnx.State, lines: Sequence[str]) -> list[str]:
    """What is decoded for each line, in their order; each process does its share of them.

    Args:
      params: the weights, on devices of this process.
    """
    index, count = jax.process_index(), jax.process_count()
    own = list(decoder.texts(params, lines[index::count]))
    texts = [""] * len(lines)
    for i, share in enumerate(_gathered(own)):
        texts[i::count] = share
    return texts


def _gathered(own: Sequence[str]) -> list[list[str]]:
    """The lines of each process, on all of them."""
    if jax.process_count() == 1:
        return [list(own)]
    content = np.frombuffer("".join(f"{line}\n" for line in own).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    # Arrays that are gathered are all of one shape.
    padded = np.pad(content, (0, int(sizes.max()) - content.size))
    shares = multihost_utils.process_allgather(padded)
    return [
        share[:size].tobytes().decode().split("\n")[:-1]
        for share, size in zip(shares, sizes.tolist(), strict=True)
    ]


def translation_figures(
    hypotheses: Sequence[str], references: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """`bleu`, `chrf` and `exact_match`, and what sacrebleu signs the first two with."""
    scores = {"bleu": bleu(hypotheses, references), "chrf": chrf(hypotheses, references)}
    figures = {name: score for name, (score, _) in scores.items()}
    figures["exact_match"] = exact_match(hypotheses, references)
    return figures, {name: signature for name, (_, signature) in scores.items()}


def make_evaluate(
    config: ConfigDict,
    model: Model,
    tokenizer: RowTokenizer,
    data: Path,
    mesh: Mesh,
    manifest: Manifest | None = None,
) -> Callable[[nnx.State, Callable[[str], None]], dict[str, float]]:
    """A function of parameters to the figures of the validation split.

    With several processes each decodes its share of the lines, with a copy of the weights of its
    own; the first one alone knows the figures of that.

    Args:
      manifest: of the data that the run began with; the function raises a ValueError when `data` is
        no longer that. What the directory says now when None.
    """
    manifest = manifest or Manifest.read(data)
    eval_step = make_eval_step(model, mesh, ids=tokenizer.ids)
    settings = config.evaluate
    sources = references = []
    if config.task == "translation" and settings.lines:
        sources, references = (
            read_lines(data / f"validation.{side}.txt")[: settings.lines]
            for side in (config.data.source, config.data.target)
        )
    decoder = LineDecoder(
        model,
        tokenizer,
        search=functools.partial(
            greedy,
            eos_id=tokenizer.ids.eos,
            rules=only_text(tokenizer.vocab_size, model.config.vocab_size, (tokenizer.ids.eos,)),
        ),
        batch_size=settings.batch_size,
        bos_id=tokenizer.ids.bos or 0,  # It is there where translations are decoded.
    )

    index, count = row_share(mesh, settings.batch_size)
    replicate = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def evaluate(params: nnx.State, print_line: Callable[[str], None]) -> dict[str, float]:
        batches = loader.eval_batches(
            data,
            "validation",
            batch_size=settings.batch_size,
            process_index=index,
            process_count=count,
            manifest=manifest,
        )
        sums = sums_of(eval_step, params, mesh, batches)
        if bad := [i for i, one in enumerate(sums) if not np.isfinite(one["loss"])]:
            row = bad[0] * settings.batch_size
            print_line(
                f"  the validation loss is not finite: of {len(bad)} of {len(sums)} batches, the "
                f"first of rows {row} to {row + settings.batch_size - 1}"
            )
        figures = mean_metrics(add_up(sums))
        if sources:
            if jax.process_count() > 1:
                params = jax.tree.map(lambda x: x.addressable_data(0), replicate(params))
            hypotheses = translate(decoder, params, sources)
            if jax.process_index() == 0:
                found, signatures = translation_figures(hypotheses, references)
                figures |= found
                print_line(f"  {sources[0]}  ->  {hypotheses[0]}  (reference: {references[0]})")
                for name, signature in signatures.items():
                    print_line(f"  {name} signature {signature}")
        return figures

    return evaluate

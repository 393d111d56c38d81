"""The figures of the validation split."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
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
from mqa_jax.train.metrics import bleu, chrf, exact_match
from mqa_jax.train.processes import put_batch, row_share
from mqa_jax.train.step import Metrics, make_eval_step, mean_metrics


def add_up(sums: Sequence[Metrics]) -> dict[str, np.float64]:
    """Sums of batches, on the host, to those of all: in float64, as a split has many tokens."""
    return {name: np.sum([one[name] for one in sums], dtype=np.float64) for name in sums[0]}


def make_evaluate(
    config: ConfigDict,
    model: Model,
    tokenizer: RowTokenizer,
    data: Path,
    mesh: Mesh,
    manifest: Manifest | None = None,
) -> Callable[[nnx.State, Callable[[str], None]], dict[str, float]]:
    """A function of parameters to the figures of the validation split.

    With several processes the first one alone decodes, with a copy of the weights of its own.

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
        sums = []
        for batch in loader.eval_batches(
            data,
            "validation",
            batch_size=settings.batch_size,
            process_index=index,
            process_count=count,
            manifest=manifest,
        ):
            sums.append(eval_step(params, put_batch(mesh, batch)))
        sums = jax.device_get(sums)
        if bad := [i for i, one in enumerate(sums) if not np.isfinite(one["loss"])]:
            row = bad[0] * settings.batch_size
            print_line(
                f"  the validation loss is not finite: of {len(bad)} of {len(sums)} batches, the "
                f"first of rows {row} to {row + settings.batch_size - 1}"
            )
        figures = mean_metrics(add_up(sums))
        if sources and jax.process_count() > 1:
            params = jax.tree.map(lambda x: x.addressable_data(0), replicate(params))
        if sources and jax.process_index() == 0:
            hypotheses = list(decoder.texts(params, sources))
            figures["bleu"], signature = bleu(hypotheses, references)
            figures["chrf"], _ = chrf(hypotheses, references)
            figures["exact_match"] = exact_match(hypotheses, references)
            print_line(f"  {sources[0]}  ->  {hypotheses[0]}  (reference: {references[0]})")
            print_line(f"  BLEU signature {signature}")
        return figures

    return evaluate

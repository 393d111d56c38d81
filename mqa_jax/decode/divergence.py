"""How far predictions of a model are from those of the one that it was made of, on given text.

Array letters: B batch   P prompt length   T answer length   V vocabulary
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mqa_jax.core.devices import product_options
from mqa_jax.core.quantized import narrowed
from mqa_jax.decode.batches import Batcher, Prompt
from mqa_jax.decode.prompts import answer_logits
from mqa_jax.model.transformer import EncoderDecoder, Model


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Means over the tokens of a text.

    Attributes:
      nats: the Kullback-Leibler divergence of the model's predictions from the first model's.
      agreement: the share of tokens in whose place both think the same one the likeliest.
      loss: the negative log-likelihood of the text, in nats a token.
      tokens: how many there are.
    """

    nats: float
    agreement: float
    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss)


def divergences(
    models: Sequence[Model],
    prompts: Sequence[Prompt],
    answers: Sequence[Prompt],
    *,
    bos_id: int,
    batch_size: int,
    name: Callable[[int], str] = "prompt {}".format,
) -> list[Divergence]:
    """Of each of some models from the first, by what they make of given answers.

    Every token is predicted from the caches that decoding would have, so that what is rounded there
    counts.

    Args:
      models: of one vocabulary and as many positions.
      prompts: as for a call of `mqa_jax.Generator`.
      answers: the ids behind each, with its end if that is to count.
      bos_id: as for `Generator`.
      batch_size: rows at once.
      name: as for `Generator`.

    Raises:
      ValueError: as `Generator.score`; no answers; or logits that are no numbers.
    """
    first = models[0].config
    batcher = Batcher(
        isinstance(models[0], EncoderDecoder), first.max_length, first.vocab_size, batch_size, None
    )
    batches = batcher.to_score(prompts, answers, name)
    if not batches:
        raise ValueError("there is no text to compare predictions of")
    split = [nnx.split(model) for model in models]
    graphs = [graphdef for graphdef, _ in split]
    dtype = jnp.dtype(first.dtype)

    options = product_options([params for _, params in split])

    @functools.partial(jax.jit, compiler_options=options)
    def sums_of(params: list[nnx.State], given: dict[str, Array]) -> dict[str, Array]:
        """`[B]` each, of every model, one behind the other."""
        log_p = [
            jax.nn.log_softmax(
                answer_logits(
                    nnx.merge(graphdef, narrowed(weights, dtype)), **given, bos_id=bos_id
                ).astype(jnp.float32)
            )
            for graphdef, weights in zip(graphs, params, strict=True)
        ]
        answer_BT, lengths_B = given["answer_BT"], given["answer_lengths_B"]
        is_real_BT = jnp.arange(answer_BT.shape[1])[None] < lengths_B[:, None]
        wanted_BTV = log_p[0]
        found: dict[str, list[Array]] = {"nats": [], "agreement": [], "loss": []}
        for own_BTV in log_p:
            far_BT = jnp.sum(jnp.exp(wanted_BTV) * (wanted_BTV - own_BTV), axis=-1)
            is_same_BT = jnp.argmax(own_BTV, axis=-1) == jnp.argmax(wanted_BTV, axis=-1)
            nll_BT = -jnp.take_along_axis(own_BTV, answer_BT[..., None], axis=-1)[..., 0]
            for each, x_BT in zip(found, (far_BT, is_same_BT, nll_BT), strict=True):
                found[each].append(jnp.sum(x_BT.astype(jnp.float32), axis=1, where=is_real_BT))
        return {each: jnp.stack(sums) for each, sums in found.items()}

    totals, tokens = {each: np.zeros(len(models)) for each in ("nats", "agreement", "loss")}, 0
    for batch in batches:
        rows = len(batch.indices)  # Those behind are the last one again.
        sums = jax.device_get(sums_of([params for _, params in split], batch.given))
        for each, sums_MB in sums.items():
            totals[each] += np.sum(sums_MB[:, :rows], axis=1, dtype=np.float64)
        tokens += int(batch.given["answer_lengths_B"][:rows].sum())
    if not all(np.isfinite(total).all() for total in totals.values()):
        raise ValueError("a model gave logits that are no numbers: are its weights whole?")
    return [
        Divergence(
            **{each: float(total[i] / tokens) for each, total in totals.items()}, tokens=tokens
        )
        for i in range(len(models))
    ]

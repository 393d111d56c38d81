"""The record that the benchmark makes of each variant and size; knows no JAX.

Array letters: B batch   C context length
"""

import dataclasses
import inspect
import re

SEARCHES = ("greedy", "beam")
BEAM_SIZE = 4  # the paper's
_CACHES = "-caches"  # Behind a dtype of theirs.
KEYS = ("search", "dtype", "batch", "context_length")  # what a row is about, beside the variant


@dataclasses.dataclass(frozen=True)
class Precision:
    """What a row of the benchmark computes in; `str` of it is the row's `dtype`.

    Attributes:
      dtype: of activations, and of all that is not in eight bits.
      quantized: the scheme of weights in eight bits, of `mqa_jax.core.quantized.SCHEMES`.
      cache_dtype: of keys and values, where it is another.
    """

    dtype: str
    quantized: str | None = None
    cache_dtype: str | None = None

    def __str__(self) -> str:
        caches = self.cache_dtype and f"{self.cache_dtype}{_CACHES}"
        return " ".join(filter(None, (self.dtype, self.quantized, caches)))

    @classmethod
    def of(cls, name: str) -> "Precision":
        """That of a row's `dtype`."""
        dtype, *others = name.split()
        caches = next((word for word in others if word.endswith(_CACHES)), None)
        scheme = next((word for word in others if word != caches), None)
        return cls(dtype, scheme, caches and caches.removesuffix(_CACHES))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a variant costs with one search, dtype, batch and context length.

    Attributes:
      variant: its name.
      search: `greedy`, or `beam` for beam search with a beam of 4.
      dtype: of weights, activations and caches; behind it, where weights are in eight bits, their
        scheme, and the dtype of caches where it is another (`Precision`).
      batch: sentences decoded at once, `B`; beam search decodes four hypotheses of each.
      context_length: source tokens, and slots of the target's cache (all of which a step reads),
        `C`; a language model has the latter alone.
      parameters: of the whole model.
      encode_ms: encoding the batch and projecting it for all layers, median of the runs; null for a
        language model.
      prefill_ms: taking `C` target tokens a row into the caches at once, median of the runs.
      steps: steps that each run took, over which its time is divided.
      step_ms: one step inside the on-device loop, median of the runs.
      step_ms_min: that of the fastest run.
      step_ms_max: that of the slowest run.
      step_alone_ms: greedy search only, else null: the same step as a program of its own, its
        caches donated, called from Python once a token, median of the runs. By how much `step_ms`
        is more than this, the loop costs.
      reorder_ms: beam search only, else null: what moving the self-attention caches among the
        hypotheses takes of `step_ms`, median of the runs, measured alone.
      encode_us_per_token: `encode_ms` an output token, there being as many as source tokens; in
        microseconds, the paper's amortized cost.
      step_us_per_token: `step_ms` an output token (of which beam search puts out one a sentence).
      weight_bytes: bytes of the weights that a step reads.
      kv_bytes: bytes of the self- and cross-attention keys and values that a step reads; those of
        beam search's self-attention are of four hypotheses a sentence.
      flops: floating-point operations of a step's products and attention.
      gb_per_s: bytes read a second, `(weight_bytes + kv_bytes) / step_ms`, in units of 1e9.
      probe_gb_per_s: what the device reads at most, measured in the same run before its rows.
      probe_gflop_per_s: what a matrix product of that dtype reaches, or, where rows are rounded to
        be multiplied with weights of eight bits, one of these; measured likewise.
      roofline_ms: the least time for a step by both probes.
      roofline_fraction: `roofline_ms / step_ms`; above 1 where processor caches hold what is read,
        or the host was busy while the probes were measured (`probe_behind` is of the same probes,
        behind the rows).
      compile_seconds: compiling the programs that this row was measured with.
    """

    variant: str
    search: str
    dtype: str
    batch: int
    context_length: int
    parameters: int
    encode_ms: float | None
    prefill_ms: float
    steps: int
    step_ms: float
    step_ms_min: float
    step_ms_max: float
    step_alone_ms: float | None
    reorder_ms: float | None
    encode_us_per_token: float | None
    step_us_per_token: float
    weight_bytes: int
    kv_bytes: int
    flops: int
    gb_per_s: float
    probe_gb_per_s: float
    probe_gflop_per_s: float
    roofline_ms: float
    roofline_fraction: float
    compile_seconds: float


# The docstring's line for each field, which the JSON repeats.
FIELDS = {
    name: " ".join(text.split())
    for name, text in re.findall(
        r"^  (\w+): (.+(?:\n {4}.+)*)", inspect.getdoc(Cost) or "", flags=re.MULTILINE
    )
}


def in_digits(value: object) -> str:
    """A float in three digits or all before the point; `-` for None."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"

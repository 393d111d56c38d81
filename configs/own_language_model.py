"""A language model of text of your own, one passage a line: for two cores of a CPU, or for a GPU.

    python train.py --config=configs/own_language_model.py --config.data.path=DIR --workdir=DIR
    python decode.py --workdir=DIR --input=FILE --output=FILE --sample

`--config.data.path` names a directory with the files train.txt and validation.txt, plain or .gz;
other names are `--config.data.splits.train=...` and `--config.data.target=...` (what stands behind
the dot). Of one file alone, book.txt, `--config.data.splits.train='book[:95%]'` takes the first
lines and `--config.data.splits.validation='book[95%:]'` the last. A row holds 128 tokens, and
passages that are longer, or blank, are left out and counted.
5 M parameters in every variant. Little text has too few different words for 4,000 tokens: the error
then says how many there can be, for `--config.data.vocab_size`. For a larger model add, say,

    --config.model.num_layers=8 --config.model.dtype=bfloat16 --config.train.steps=20000
"""

from ml_collections import ConfigDict

from mqa_jax.core.config import base_config, choose

VARIANTS = {
    "multi_head": dict(num_heads=4, num_kv_heads=4, head_dim=64, d_ff=1024),
    "multi_query": dict(num_heads=4, num_kv_heads=1, head_dim=64, d_ff=1216),
    "multi_query_local": dict(num_heads=4, num_kv_heads=1, head_dim=64, d_ff=1216, window=32),
    "grouped_query_2": dict(num_heads=4, num_kv_heads=2, head_dim=64, d_ff=1152),
    # The paper's narrow baselines: multi-head with the caches of multi_query.
    "multi_head_h1": dict(num_heads=1, num_kv_heads=1, head_dim=64, d_ff=1408),
    "multi_head_h2": dict(num_heads=2, num_kv_heads=2, head_dim=32, d_ff=1408),
    "multi_head_h4": dict(num_heads=4, num_kv_heads=4, head_dim=16, d_ff=1408),
    "multi_head_h8_k8": dict(num_heads=8, num_kv_heads=8, head_dim=8, d_ff=1408),
}


def get_config(variant: str = "multi_query") -> ConfigDict:
    config = base_config(choose(variant, VARIANTS))
    config.task = "language_model"
    config.model.update(
        vocab_size=4_000, d_model=256, num_layers=4, dropout_rate=0.1, dtype="float32"
    )
    config.data.update(path="text", source="", target="txt")
    config.data.update(source_length=0, on_invalid="drop")
    config.data.target_length = config.model.get_ref("max_length")
    config.model.max_length = 128
    config.data.splits.test = ""
    config.train.update(
        steps=2_000,
        batch_size=32,
        hold_steps=1_000,
        warmup_steps=100,
        decay_steps=1_000,
        evaluate_every=500,
        checkpoint_every=250,
        keep_checkpoints=2,
    )
    return config

"""Multi30k, English to German: 29,000 captions of pictures; or parallel text of your own.

    python train.py --config=configs/multi30k.py:multi_query --config.data.path=DIR --workdir=DIR
    python decode.py --workdir=DIR --input=FILE --output=FILE --beam_size=4

`--config.data.path` names a directory with the files train.en, train.de, val.en, val.de,
test_2016_flickr.en and test_2016_flickr.de, plain or .gz. A small model (9.5 M parameters in
every variant), for a GPU or a TPU: docs/results.md has its BLEU. For two cores of a CPU, add

    --config.model.num_layers=2 --config.model.dtype=float32 --config.model.dropout_rate=0.1
    --config.train.steps=1200 --config.train.batch_size=16 --config.train.warmup_steps=100
    --config.train.decay_steps=600
"""

from ml_collections import ConfigDict

from mqa_jax.core.config import base_config, choose

VARIANTS = {
    "multi_head": dict(num_heads=4, num_kv_heads=4, head_dim=64, d_ff=1024),
    "multi_query": dict(num_heads=4, num_kv_heads=1, head_dim=64, d_ff=1312),
    "multi_head_local": dict(num_heads=4, num_kv_heads=4, head_dim=64, d_ff=1024, window=8),
    "multi_query_local": dict(num_heads=4, num_kv_heads=1, head_dim=64, d_ff=1312, window=8),
    "grouped_query_2": dict(num_heads=4, num_kv_heads=2, head_dim=64, d_ff=1216),
    # The paper's narrow baselines: multi-head with the caches of multi_query.
    "multi_head_h1": dict(num_heads=1, num_kv_heads=1, head_dim=64, d_ff=1600),
    "multi_head_h2": dict(num_heads=2, num_kv_heads=2, head_dim=32, d_ff=1600),
    "multi_head_h4": dict(num_heads=4, num_kv_heads=4, head_dim=16, d_ff=1600),
    "multi_head_h8_k8": dict(num_heads=8, num_kv_heads=8, head_dim=8, d_ff=1600),
}


def get_config(variant: str = "multi_query") -> ConfigDict:
    config = base_config(choose(variant, VARIANTS))
    config.model.update(
        vocab_size=8_000, d_model=256, num_layers=4, max_length=128, dropout_rate=0.25
    )
    config.data.path = "../multi30k"
    config.data.update(source_length=96, target_length=96)
    config.data.splits.update(validation="val", test="test_2016_flickr")
    config.train.update(
        steps=4_000,
        batch_size=48,
        learning_rate=2.0,
        hold_steps=4_000,
        warmup_steps=400,
        decay_steps=3_000,
        label_smoothing=0.1,
        z_loss=1e-4,
        evaluate_every=1_000,
        checkpoint_every=500,
        keep_checkpoints=2,
    )
    config.evaluate.lines = 1_000
    return config

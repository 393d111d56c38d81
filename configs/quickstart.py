"""Number phrases, English to German: a small multi-query model that a laptop CPU trains in minutes.

    python train.py --config=configs/quickstart.py --workdir=DIR

"two hundred and five dollars" to "zweihundertfünf Dollar": 60,000 phrases that need no download.
Expected: over 98 % of phrases never seen translated to the letter, after about two minutes on two
cores.
"""

from ml_collections import ConfigDict

from mqa_jax.core.config import base_config, choose

VARIANTS = {
    "multi_head": dict(num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512),
    "multi_query": dict(num_heads=4, num_kv_heads=1, head_dim=32, d_ff=656),
    "multi_head_local": dict(num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512, window=8),
    "multi_query_local": dict(num_heads=4, num_kv_heads=1, head_dim=32, d_ff=656, window=8),
}


def get_config(variant: str = "multi_query") -> ConfigDict:
    config = base_config(choose(variant, VARIANTS))
    config.model.update(vocab_size=512, d_model=128, num_layers=2, max_length=128, dtype="float32")
    config.data.update(builder="number_phrases", dir="data/number_phrases")
    config.data.update(source_length=64, target_length=48)
    config.train.update(
        steps=500,
        batch_size=32,
        optimizer="adamw",
        learning_rate=0.05,
        hold_steps=200,
        warmup_steps=100,
        decay_steps=250,
        evaluate_every=250,
        checkpoint_every=250,
        keep_checkpoints=2,
    )
    config.evaluate.lines = 256
    return config

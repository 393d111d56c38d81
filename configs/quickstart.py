"""Number phrases, English to German: a small multi-query model that a laptop CPU trains in minutes.

    python train.py --config=configs/quickstart.py --workdir=DIR

"two hundred and five dollars" to "zweihundertfünf Dollar": 60,000 phrases that need no download.
Expected: over 98 % of phrases never seen translated to the letter, after about three minutes on two
cores.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

VARIANTS = {
    "multi_head": dict(num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512),
    "multi_query": dict(num_heads=4, num_kv_heads=1, head_dim=32, d_ff=656),
    "multi_head_local": dict(num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512, window=8),
    "multi_query_local": dict(num_heads=4, num_kv_heads=1, head_dim=32, d_ff=656, window=8),
}


def get_config(variant: str = "multi_query") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {sorted(VARIANTS)}")
    vocab_size = FieldReference(512)
    return ConfigDict(
        dict(
            task="translation",
            model=dict(
                vocab_size=vocab_size,
                d_model=128,
                num_layers=2,
                max_length=128,
                window=placeholder(int),
                dropout_rate=0.0,
                attention_dropout_rate=0.0,
                relu_dropout_rate=0.0,
                remat=False,
                dtype="float32",
                param_dtype="float32",
            )
            | VARIANTS[variant],
            data=dict(
                builder="number_phrases",
                path="",
                source="en",
                target="de",
                splits=dict(train="train", validation="validation", test="test"),
                dir="data/number_phrases",
                tfds_dir="",
                source_length=64,
                target_length=48,
                pack=True,
                on_invalid="error",
                vocab_size=vocab_size,
            ),
            train=dict(
                steps=1_000,
                batch_size=32,
                accumulate=1,
                optimizer="adamw",
                learning_rate=0.05,
                hold_steps=400,
                warmup_steps=200,
                decay_steps=500,
                weight_decay=0.0,
                label_smoothing=0.0,
                z_loss=0.0,
                seed=0,
                log_every=100,
                evaluate_every=250,
                checkpoint_every=250,
                keep_checkpoints=2,
                max_skipped_steps=10,
            ),
            evaluate=dict(lines=256, batch_size=64),
            mesh=dict(data=-1, fsdp=1, tensor=1),
        )
    )

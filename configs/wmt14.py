"""WMT 2014 English to German, the paper's translation task (Shazeer 2019, section 4.1, table 1).

    python -m mqa_jax.data.prepare --config=configs/wmt14.py --config.data.dir=DIR
    python train.py --config=configs/wmt14.py:multi_query --config.data.dir=DIR --workdir=DIR
    python decode.py --benchmark --config=configs/wmt14.py --output_dir=DIR

The first needs the extra `[prepare]`. 100,000 steps of 128 rows of 256 + 256 tokens; the paper took
about two hours on 32 TPUv3 cores. All variants have 211 M parameters: what attention gives up, the
feed-forward layers get.

    variant            heads  kv  dim  window  d_ff    paper: ln PPL  BLEU dev  test beam 1 / 4
    multi_head           8     8  128     -    4096           1.424     26.7      27.7 / 28.4
    multi_query          8     1  128     -    5440           1.439     26.5      27.5 / 28.5
    multi_head_local     8     8  128    32    4096           1.427     26.6      27.5 / 28.3
    multi_query_local    8     1  128    32    5440           1.437     26.5      27.6 / 28.2
    multi_head_h1        1     1  128     -    6784           1.518     25.8
    multi_head_h2        2     2   64     -    6784           1.480     26.2      26.8 / 27.9
    multi_head_h4        4     4   32     -    6784           1.488     26.1
    multi_head_h8_k16    8     8   16     -    6784           1.513     25.8
    grouped_query_2      8     2  128     -    5248           (not in the paper)
    grouped_query_4      8     4  128     -    4864           (not in the paper)
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

VARIANTS = {
    "multi_head": dict(num_heads=8, num_kv_heads=8, head_dim=128, d_ff=4096),
    "multi_query": dict(num_heads=8, num_kv_heads=1, head_dim=128, d_ff=5440),
    "multi_head_local": dict(num_heads=8, num_kv_heads=8, head_dim=128, window=32, d_ff=4096),
    "multi_query_local": dict(num_heads=8, num_kv_heads=1, head_dim=128, window=32, d_ff=5440),
    "multi_head_h1": dict(num_heads=1, num_kv_heads=1, head_dim=128, d_ff=6784),
    "multi_head_h2": dict(num_heads=2, num_kv_heads=2, head_dim=64, d_ff=6784),
    "multi_head_h4": dict(num_heads=4, num_kv_heads=4, head_dim=32, d_ff=6784),
    "multi_head_h8_k16": dict(num_heads=8, num_kv_heads=8, head_dim=16, d_ff=6784),
    "grouped_query_2": dict(num_heads=8, num_kv_heads=2, head_dim=128, d_ff=5248),
    "grouped_query_4": dict(num_heads=8, num_kv_heads=4, head_dim=128, d_ff=4864),
}


def get_config(variant: str = "multi_query") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {sorted(VARIANTS)}")
    vocab_size = FieldReference(33_792)
    length = FieldReference(256)
    return ConfigDict(
        dict(
            task="translation",
            model=dict(
                vocab_size=vocab_size,
                d_model=1024,
                num_layers=6,
                max_length=length,
                window=placeholder(int),
                dropout_rate=0.2,
                attention_dropout_rate=0.1,
                relu_dropout_rate=0.1,
                remat=False,
                dtype="bfloat16",
                param_dtype="float32",
            )
            | VARIANTS[variant],
            data=dict(
                builder="wmt14_translate/de-en",
                path="",
                source="en",
                target="de",
                splits=dict(train="train", validation="validation", test="test"),
                dir="data/wmt14",
                tfds_dir="",
                source_length=length,
                target_length=length,
                pack=True,
                on_invalid="drop",
                vocab_size=vocab_size,
            ),
            train=dict(
                steps=100_000,
                batch_size=128,
                accumulate=1,
                optimizer="adafactor",
                learning_rate=1.0,
                hold_steps=10_000,
                warmup_steps=0,
                decay_steps=20_000,
                weight_decay=0.0,
                label_smoothing=0.1,
                z_loss=1e-4,
                seed=0,
                log_every=100,
                evaluate_every=5_000,
                checkpoint_every=2_500,
                keep_checkpoints=3,
                max_skipped_steps=10,
            ),
            evaluate=dict(lines=3_000, batch_size=64),
            mesh=dict(data=-1, fsdp=1, tensor=1),
        )
    )

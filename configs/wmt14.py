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

from ml_collections import ConfigDict

from mqa_jax.core.config import base_config, choose

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
    config = base_config(choose(variant, VARIANTS))
    config.model.update(dropout_rate=0.2, attention_dropout_rate=0.1, relu_dropout_rate=0.1)
    config.data.update(builder="wmt14_translate/de-en", dir="data/wmt14", on_invalid="drop")
    config.data.source_length = config.data.target_length = config.model.get_ref("max_length")
    config.train.update(label_smoothing=0.1, z_loss=1e-4)
    config.evaluate.lines = 3_000
    return config

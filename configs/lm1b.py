"""The Billion-Word language model benchmark (Shazeer 2019, section 4.3, table 3).

    python -m mqa_jax.data.prepare --config=configs/lm1b.py --config.data.dir=DIR
    python train.py --config=configs/lm1b.py:multi_query --config.data.dir=DIR --workdir=DIR
    python decode.py --benchmark --config=configs/lm1b.py --output_dir=DIR

The first needs the extra `[prepare]`. 136,000 steps of 256 rows of 256 tokens. A decoder alone, its
softmax weights not shared with the embedding; no dropout, no label smoothing. All variants have
192 M parameters: what attention gives up, the feed-forward layers get.

    variant            heads  kv  dim  window  d_ff    paper: dev perplexity a word
    multi_head           8     8  128     -    8192            29.9
    multi_query          8     1  128     -    9088            30.2
    multi_head_h1        1     1  128     -    9984            31.2
    multi_head_h2        2     2   64     -    9984            31.1
    multi_head_h4        4     4   32     -    9984            31.0
    multi_head_h8_k16    8     8   16     -    9984            30.9
    multi_head_local     8     8  128    32    8192            (not in the paper)
    multi_query_local    8     1  128    32    9088            (not in the paper)
    grouped_query_2      8     2  128     -    8960            (not in the paper)
    grouped_query_4      8     4  128     -    8704            (not in the paper)
"""

from ml_collections import ConfigDict

from mqa_jax.core.config import base_config, choose

VARIANTS = {
    "multi_head": dict(num_heads=8, num_kv_heads=8, head_dim=128, d_ff=8192),
    "multi_query": dict(num_heads=8, num_kv_heads=1, head_dim=128, d_ff=9088),
    "multi_head_local": dict(num_heads=8, num_kv_heads=8, head_dim=128, window=32, d_ff=8192),
    "multi_query_local": dict(num_heads=8, num_kv_heads=1, head_dim=128, window=32, d_ff=9088),
    "multi_head_h1": dict(num_heads=1, num_kv_heads=1, head_dim=128, d_ff=9984),
    "multi_head_h2": dict(num_heads=2, num_kv_heads=2, head_dim=64, d_ff=9984),
    "multi_head_h4": dict(num_heads=4, num_kv_heads=4, head_dim=32, d_ff=9984),
    "multi_head_h8_k16": dict(num_heads=8, num_kv_heads=8, head_dim=16, d_ff=9984),
    "grouped_query_2": dict(num_heads=8, num_kv_heads=2, head_dim=128, d_ff=8960),
    "grouped_query_4": dict(num_heads=8, num_kv_heads=4, head_dim=128, d_ff=8704),
}


def get_config(variant: str = "multi_query") -> ConfigDict:
    config = base_config(choose(variant, VARIANTS))
    config.task = "language_model"
    config.model.vocab_size = 32_000
    config.data.update(builder="lm1b", dir="data/lm1b", on_invalid="drop")
    config.data.update(source="", target="text", source_length=0)
    config.data.target_length = config.model.get_ref("max_length")
    config.data.splits.update(validation="test", test="")
    config.train.update(steps=136_000, batch_size=256, decay_steps=13_600, z_loss=1e-4)
    return config

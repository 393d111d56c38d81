"""The fields of a config: what each means, and what it is where a config file says nothing.

A config file says how it differs:

    def get_config(variant: str = "multi_query") -> ConfigDict:
        config = base_config(choose(variant, VARIANTS))
        config.train.steps = 1_000
        return config

Here, and not beside what reads them, since the benchmark reads configs where nothing for training
is installed. `mqa_jax.train.config` has what values make sense.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def choose(variant: str, variants: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The fields of `config.model` in which a variant differs from the others.

    Raises:
      ValueError: there is no such variant.
    """
    if variant not in variants:
        raise ValueError(f"variant {variant!r} is not one of {sorted(variants)}")
    return variants[variant]


def base_config(model: Mapping[str, Any] | None = None) -> ConfigDict:
    """Every field there is, with the values of the paper's translation task.

    Args:
      model: fields of `config.model` that have others.
    """
    vocab_size = FieldReference(33_792)  # One number for the model and for the data.
    config = ConfigDict(
        dict(
            task="translation",  # Or "language_model", without a source.
            # A directory of the Hugging Face hub, or the workdir of a run, whose model is trained
            # further, with its tokenizer. Of `model`, rates, dtypes and `remat` are then the
            # config's, and the rest that model's.
            init_from="",
            # Or "continued": with the moments of that run's optimizer too. The schedule follows the
            # new run's steps all the same.
            init_optimizer="fresh",
            # The fields of `mqa_jax.TransformerConfig`, which says what they are.
            model=dict(
                vocab_size=vocab_size,
                d_model=1024,
                d_ff=4096,
                num_layers=6,
                num_heads=8,
                num_kv_heads=8,
                head_dim=128,
                max_length=256,
                window=placeholder(int),
                num_encoder_layers=placeholder(int),
                encoder_kv_heads=placeholder(int),
                cross_kv_heads=placeholder(int),
                norm="rms",
                norm_epsilon=1e-6,
                block="pre",
                parallel_norms=1,
                positions="learned",
                rope=dict(
                    theta=10_000.0,
                    scaling="default",
                    factor=1.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_length=placeholder(int),
                ),
                relative_buckets=32,
                relative_distance=128,
                attention_scale=placeholder(float),
                qk_norm=False,
                attention_softcap=placeholder(float),
                logits_softcap=placeholder(float),
                bias=(),
                activation="relu",
                gated=False,
                embedding_scale=1.0,
                tied_softmax=placeholder(bool),
                logits_scale=placeholder(float),
                dropout_rate=0.0,
                attention_dropout_rate=0.0,
                relu_dropout_rate=0.0,
                remat=False,
                dtype="bfloat16",
                param_dtype="float32",
                quantized=placeholder(str),
                cache_dtype=placeholder(str),
            ),
            # What `python -m mqa_jax.data.prepare` makes of what; see there.
            data=dict(
                builder="parallel_text",
                path="",
                source="en",
                target="de",
                splits=dict(train="train", validation="validation", test="test"),
                dir="",
                tfds_dir="",
                source_length=256,
                target_length=256,
                pack=True,
                on_invalid="error",
                vocab_size=vocab_size,
                subword_samples=0,
                subword_alpha=0.3,
            ),
            train=dict(
                steps=100_000,
                batch_size=128,  # Rows of an update, over all devices.
                accumulate=1,  # Parts that they are taken in one after the other, to save memory.
                optimizer="adafactor",  # Or "adamw".
                learning_rate=1.0,  # These four are of `mqa_jax.train.optimizer.rsqrt_schedule`.
                hold_steps=10_000,
                warmup_steps=0,
                decay_steps=20_000,
                weight_decay=0.0,  # Times the learning rate; of norms and positions none.
                label_smoothing=0.0,  # These two are of `mqa_jax.train.loss.cross_entropy`.
                z_loss=0.0,
                # These two are of `mqa_jax.train.loss.token_losses`; the teacher is a directory as
                # `init_from` takes it, of a model of the same task and tokenizer.
                r_drop=0.0,
                distillation=0.0,
                teacher="",
                seed=0,  # Of the weights, of dropout and of the order of the data.
                log_every=100,  # These three are steps.
                evaluate_every=5_000,
                checkpoint_every=2_500,
                keep_checkpoints=3,  # The newest.
                # A figure of the validation (loss, ln_perplexity, accuracy, bleu, chrf or
                # exact_match), whose best checkpoint is kept, too; and after how many evaluations
                # in a row without a better one the run ends. "" and 0: neither.
                best="",
                patience=0,
                max_skipped_steps=10,  # So many in a row that are not finite end the run.
            ),
            # Of the validation split: how many lines are translated for BLEU, 0 for none (and
            # always none of a language model), and the rows or lines at a time.
            evaluate=dict(lines=0, batch_size=64),
            # Devices along each axis of `mqa_jax.core.sharding.make_mesh`; -1: all that are left.
            mesh=dict(data=-1, fsdp=1, tensor=1),
        )
    )
    config.model.update(model or {})
    return config

"""Makes text ready for training: tokenized, packed, on disk.

    mqa-jax prepare --config=multi30k --config.data.path=DIR [--config.data.dir=DIR ...]

Training does the same before its first step; this does it alone, where there is no accelerator say.
`mqa_jax.data.prepare` says what the fields of `config.data` mean.
"""

from absl import flags

from mqa_jax.cli.arguments import define_config, refuse_overridden


def define(values: flags.FlagValues) -> None:
    """The flags of this command."""
    define_config(values)


def run(args: flags.FlagValues) -> None:
    """Prepares, or finds that all is there."""
    if args.config is None:
        raise ValueError("give --config, such as --config=quickstart")

    from mqa_jax.data.prepare import prepare
    from mqa_jax.train.start import find_start

    refuse_overridden(args)
    start = find_start(args.config)
    prepare(start.config.data, start.tokenizer)

"""Writes the model of a run for others:

    mqa-jax export --workdir=DIR --output=DIR [--family=llama]
    mqa-jax export --workdir=DIR --output=FILE.npz

A directory is one as the Hugging Face hub has them, which transformers reads. A run that began from
such a directory has its tokenizer and its settings; of another run --family says what the model is
to be, where it fits into one, and the tokenizer stays behind. A file is NumPy's, of weights by
their names in the model, and of the config as JSON.
"""

import functools

from absl import flags

from mqa_jax.cli.arguments import refuse_idle
from mqa_jax.cli.source import check_run, define_run, step_of
from mqa_jax.core.extras import require
from mqa_jax.core.paths import check_place, local_path


def define(values: flags.FlagValues) -> None:
    """The flags of this command."""
    define_run(values)
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    string("output", None, "a new directory, or a new file whose name ends in .npz")
    string("family", None, "for a directory: the model_type that it is of, such as llama or t5")


def run(args: flags.FlagValues) -> None:
    """Writes, and tells where."""
    for name in ("workdir", "output"):
        if args[name].value is None:
            raise ValueError(f"give --{name}")
    workdir, output = local_path("--workdir", args.workdir), local_path("--output", args.output)
    is_directory = output.suffix != ".npz"
    refuse_idle(args, [(is_directory, "for a file, which is of no family", "family")])
    check_run(args)
    check_place("--output", output)
    if output.exists():
        raise ValueError(f"--output {args.output} is there already: give another, or remove it")

    from mqa_jax.train.npz import save_npz
    from mqa_jax.train.start import pretrained
    from mqa_jax.train.workdir import HUB_TOKENIZER, load_config, load_run, tokenizer_file

    load_config(workdir)
    chosen = dict(step=step_of(args), average=args.average)
    if not is_directory:
        save_npz(output, load_run(workdir, **chosen))
    else:
        require("hub", "a directory of the hub")

        from flax import nnx

        from mqa_jax import hub
        from mqa_jax.hub.families import family_named

        if args.family is not None:
            family_named(args.family)
        if tokenizer_file(workdir).name == HUB_TOKENIZER:
            hub.save(output, pretrained(workdir, **chosen), family=args.family)
        elif args.family is None:
            raise ValueError(
                f"{workdir} did not begin from a directory of the hub: give --family, such as "
                "--family=llama, to write its model without its tokenizer, or --output=FILE.npz"
            )
        else:
            trained = load_run(workdir, **chosen)
            model = nnx.merge(nnx.graphdef(trained.model), trained.params)
            hub.save(output, model, family=args.family)
    print(f"{output} is written")

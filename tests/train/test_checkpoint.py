"""Checkpoints: what goes in comes out, bit for bit, and a resumed run is the run itself."""

import dataclasses
import functools
import gc
import json
import shutil
import time
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from running import ROOT, run_well

from mqa_jax.core.sharding import MESH_AXES
from mqa_jax.model.transformer import build_model
from mqa_jax.train import checkpoint
from mqa_jax.train.checkpoint import Checkpoints, SaveError
from mqa_jax.train.optimizer import build_optimizer
from mqa_jax.train.state import TrainState, init_state
from mqa_jax.train.step import make_train_step

# Wide enough for Adafactor to factor the moments of the first.
SHAPES = {"factored": (129, 130), "half": (4, 6), "vector": (6,)}


class Weights(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Param(jnp.zeros(shape)) for shape in SHAPES.values()])
        self.half = nnx.Param(jnp.zeros(SHAPES["half"], jnp.bfloat16))


def make_state(optimizer, seed, *, step, devices=1):
    """Random numbers in place of weights, moments and counts; `D` of them is split."""
    params = nnx.state(Weights())
    tree = TrainState(
        jnp.int32(step), params, build_optimizer(optimizer, lambda _: 0.1).init(params)
    )
    if isinstance(devices, int):
        devices = jax.devices()[:devices]
    mesh = jax.make_mesh((1, len(devices), 1), MESH_AXES, (AxisType.Auto,) * 3, devices=devices)
    rng = np.random.default_rng(seed)

    def fill(x):
        spec = PartitionSpec(None, "fsdp") if x.ndim == 2 else PartitionSpec()
        value = rng.normal(scale=100, size=x.shape).astype(x.dtype)
        return jax.device_put(value, NamedSharding(mesh, spec))

    return dataclasses.replace(jax.tree.map(fill, tree), step=fill(tree.step) * 0 + step)


def same(actual, expected):
    """Structure, values and dtypes; NaN nowhere."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        assert not np.isnan(np.asarray(x, np.float32)).any()


def no_space(*_):
    raise OSError(28, "No space left on device")


def saved(directory, *states, keep=3):
    checkpoints = Checkpoints(directory, keep=keep)
    for state in states:
        checkpoints.save(state)
    checkpoints.close()


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_what_is_saved_is_restored(tmp_path, optimizer, devices):
    state = make_state(optimizer, 0, step=7)
    assert optimizer == "adamw" or (129,) in {x.shape for x in jax.tree.leaves(state.opt_state)}
    saved(tmp_path, state)
    fresh = Checkpoints(tmp_path)
    assert fresh.latest_step() == 7
    # Into a state of other values, on as many devices as that state is on.
    into = make_state(optimizer, 1, step=3, devices=devices)
    restored = fresh.restore(into)
    fresh.close()
    same(restored, state)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(into), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_the_newest_ones_are_kept(tmp_path):
    states = [make_state("adamw", step, step=step) for step in (2, 5, 9, 11)]
    saved(tmp_path, *states, keep=2)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [9, 11]
    checkpoints = Checkpoints(tmp_path)
    same(checkpoints.restore(states[0]), states[-1])
    checkpoints.close()


def test_those_that_are_spared_are_kept_besides(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, spared in ((1, ()), (2, ()), (3, (1,)), (4, (1, 9)), (5, (4, 3)), (6, (2, 5))):
            checkpoints.save(make_state("adamw", 0, step=step), spared)
            checkpoints.wait()
            found = sorted(int(path.name) for path in tmp_path.iterdir())
            assert found == {3: [1, 2, 3], 4: [1, 3, 4], 5: [3, 4, 5], 6: [5, 6]}.get(
                step, list(range(1, step + 1))
            )


def test_weights_alone(tmp_path):
    state = make_state("adafactor", 0, step=4)
    saved(tmp_path, state)
    checkpoints = Checkpoints(tmp_path)
    same(checkpoints.restore_params(make_state("adamw", 1, step=0).params), state.params)
    shapes = nnx.state(nnx.eval_shape(Weights))
    same(checkpoints.restore_params(shapes), state.params)
    # A run's state has arrays where a module has Variables around them.
    same(checkpoints.restore_params(nnx.as_pure(shapes)), nnx.as_pure(state.params))
    checkpoints.close()


def test_no_checkpoint(tmp_path):
    checkpoints, state = Checkpoints(tmp_path / "none"), make_state("adamw", 0, step=0)
    assert checkpoints.latest_step() is None
    for restore in (
        lambda: checkpoints.restore(state),
        lambda: checkpoints.restore_params(state.params),
    ):
        with pytest.raises(ValueError, match=r"no checkpoint in .*none: train first"):
            restore()
    checkpoints.close()


@pytest.mark.parametrize(("keep", "kind"), [(0, "at least 1"), (-1, "at least 1"), (2.0, "an int")])
def test_none_kept(tmp_path, keep, kind):
    with pytest.raises(ValueError, match=f"keep must be {kind}.*, not {keep}"):
        Checkpoints(tmp_path, keep=keep)


def test_an_address_is_refused():
    with pytest.raises(ValueError, match="'gs://bucket/run' is an address"):
        Checkpoints("gs://bucket/run")


ELSEWHERE = """
import sys
import jax
from flax import nnx
sys.path += ["tests", "tests/train"]
from test_checkpoint import Weights, make_state, saved
from mqa_jax.train.checkpoint import Checkpoints
assert jax.device_count() == 1
read, written = sys.argv[1:]
with Checkpoints(read) as checkpoints:
    shapes = nnx.state(nnx.eval_shape(Weights))
    params = checkpoints.restore_params(shapes)
    state = checkpoints.restore(make_state("adamw", 5, step=0))
for x in jax.tree.leaves((params, state)):
    assert x.devices() == {jax.devices()[0]}
saved(written, state)
"""


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_other_devices_read_what_these_wrote_and_back(tmp_path, devices):
    """Those of another process, which has one alone: none of those that the arrays were on."""
    state = make_state("adamw", 0, step=7, devices=jax.devices()[-devices:])
    saved(tmp_path / "many", state)
    run_well("-c", ELSEWHERE, tmp_path / "many", tmp_path / "one", cwd=ROOT)
    with Checkpoints(tmp_path / "one") as checkpoints:
        same(checkpoints.restore(state), state)


NAMES = [
    "a [b]",
    "[",
    "]/deep",
    "back\\slash",
    "*?",
    "{a}",
    "%20 #ü~",
    "new\nline",
    "gs:b",
    "a/../b",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_directory_will_do(tmp_path, name):
    """Also the parent's; what is written lies there, and nowhere else."""
    state, directory = make_state("adamw", 0, step=4), tmp_path / name / "checkpoints"
    (tmp_path / "a").mkdir()
    saved(f"{directory}/", state)
    # A plain name reads the same: it is the same files.
    shutil.copytree(directory, tmp_path / "plain")
    for path in (directory, tmp_path / "plain"):
        with Checkpoints(path) as checkpoints:
            same(checkpoints.restore(make_state("adamw", 1, step=0)), state)
    found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.ocdbt")}
    assert found == {"plain", (tmp_path / name).resolve().relative_to(tmp_path).parts[0]}


def test_a_link_and_dots_lead_where_they_lead(tmp_path, monkeypatch):
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far/deep")
    monkeypatch.chdir(tmp_path)
    state = make_state("adamw", 0, step=4)
    saved("near/../run", state)
    assert (tmp_path / "far/run/4/manifest.json").exists() and not (tmp_path / "run").exists()
    with Checkpoints("far/run") as checkpoints:
        same(checkpoints.restore(state), state)


@pytest.mark.parametrize("name", ["layers/0", "half"])
def test_what_reads_back_otherwise_is_not_signed(tmp_path, monkeypatch, name):
    """Zeros in place of an array, all files whole: what a lost chunk looks like."""
    states = [make_state("adamw", step, step=step) for step in (4, 6)]
    saved(tmp_path, states[0])
    wait = ocp.AsyncCheckpointer.wait_until_finished

    def wait_and_lose(self):
        wait(self)
        if (params := tmp_path / "6.unsigned/params").exists():
            base = {"driver": "file", "path": f"{params}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            array = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()
            array.write(np.zeros(array.shape, array.dtype.numpy_dtype)).result()

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", wait_and_lose)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(states[1])
    with pytest.raises(SaveError, match=f"checkpoint 6 .*params/{name} is not what was written"):
        checkpoints.wait()
    checkpoints.close()
    with Checkpoints(tmp_path) as checkpoints:
        same(checkpoints.restore(states[1]), states[0])


def test_what_is_not_ours_is_left(tmp_path, caplog):
    """Neither read, nor counted, nor deleted."""
    # The last of them is a digit to Python, and no number.
    names = [
        "12 (copy)",
        "7.tmp",
        "2024",
        "007",
        "notes.unsigned",
        "5.unsigned-mine",
        "\N{SUPERSCRIPT TWO}",
    ]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / "9").touch()
    (tmp_path / "8.unsigned").touch()
    states = [make_state("adamw", step, step=step) for step in (4, 6)]
    saved(tmp_path, *states, keep=1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 6
        same(checkpoints.restore(states[0]), states[1])
    assert {path.name for path in tmp_path.iterdir()} == {*names, "9", "8.unsigned", "6"}
    assert all((tmp_path / name / "mine").exists() for name in names)


def test_the_one_just_signed_stays_whatever_else_there_is(tmp_path):
    """Newer ones, as of another run, and one that was moved to another disk."""
    saved(tmp_path / "far", make_state("adamw", 0, step=4))
    saved(tmp_path / "run", make_state("adamw", 1, step=100))
    (tmp_path / "run/4").symlink_to(tmp_path / "far/4")
    saved(tmp_path / "run", make_state("adamw", 2, step=6), keep=1)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"4", "6", "100"}
    assert (tmp_path / "far/4/manifest.json").exists()


def test_an_error_waits_for_the_save_and_stays_the_error(tmp_path, caplog, monkeypatch):
    state = make_state("adamw", 0, step=4)
    with pytest.raises(KeyError, match="reason"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        raise KeyError("reason")
    with Checkpoints(tmp_path) as checkpoints:
        same(checkpoints.restore(make_state("adamw", 1, step=0)), state)
    # A save that fails meanwhile is told of, and not the reason.
    monkeypatch.setattr(checkpoint, "_hashes", no_space)
    with pytest.raises(KeyError, match="reason"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state("adamw", 1, step=6))
        raise KeyError("reason")
    assert "checkpoint 6 could not be written" in caplog.text
    # Without another error it is one.
    with pytest.raises(SaveError, match="checkpoint 6"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state("adamw", 1, step=6))


def test_what_orbax_says_as_it_is_closed_does_not_hide_the_save_that_failed(tmp_path):
    for failed, expected in ((True, SaveError), (False, OSError)):
        checkpoints = Checkpoints(tmp_path)
        if failed:
            future = Future()
            future.set_exception(OSError(28, "No space left on device"))
            checkpoints._saving = 6, future
        close = checkpoints._checkpointer.close

        def close_badly(close=close):
            close()
            raise OSError(28, "of its metadata")

        checkpoints._checkpointer.close = close_badly
        with pytest.raises(expected) as found:
            checkpoints.close()
        assert ("checkpoint 6 could not be written" in str(found.value)) == failed


def test_what_the_run_says_of_itself_is_signed(tmp_path):
    state = make_state("adamw", 0, step=4)
    with Checkpoints(tmp_path, run={"config": {"ä": [1, None]}}) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.run() == {"config": {"ä": [1, None]}}
        same(checkpoints.restore_params(state.params), state.params)
    (tmp_path / "4/run.json").write_text("{}")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"4: \['run.json'\]"),
    ):
        checkpoints.run()
    # Before version 0.2 it said nothing.
    signed = json.loads((tmp_path / "4/manifest.json").read_text())
    del signed["run.json"]
    (tmp_path / "4/manifest.json").write_text(json.dumps(signed))
    (tmp_path / "4/run.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.run() == {}
        same(checkpoints.restore(state), state)


# Orbax drops the reads of the other arrays when one fails.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_model_of_another_size(tmp_path):
    state = make_state("adamw", 0, step=4)
    saved(tmp_path, state)
    checkpoints = Checkpoints(tmp_path)
    longer = jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.ndim else x, state.params)
    with pytest.raises(ValueError, match=r"\(8, 6\).*\(4, 6\)|\(258, 130\).*\(129, 130\)|12.*6"):
        checkpoints.restore_params(longer)
    checkpoints.close()
    time.sleep(1)
    gc.collect()  # So that the warnings come here, and not in a test to come.


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": lambda path: path.write_bytes(
        bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
    ),
    "deleted": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Of steps 4 and 6, with the states that they hold."""
    directory = tmp_path_factory.mktemp("checkpoints")
    states = [make_state("adamw", step, step=step) for step in (4, 6)]
    saved(directory, *states)
    return directory, states


@pytest.mark.parametrize(
    "damage",
    [name if name == "flipped" else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES],
)
def test_every_damaged_file_is_named_and_the_one_before_is_used(
    two_checkpoints, tmp_path, caplog, damage
):
    """Also those that Orbax reads without a check, or not at all."""
    original, (good, bad) = two_checkpoints
    files = [path.relative_to(original) for path in (original / "6").rglob("*") if path.is_file()]
    assert len(files) > 10 and any("d" in path.parts for path in files)
    for i, name in enumerate(files):
        directory = tmp_path / str(i)
        shutil.copytree(original, directory)
        DAMAGES[damage](directory / name)
        checkpoints = Checkpoints(directory)
        caplog.clear()
        # Whoever only reads leaves it as it is; the run puts it aside.
        same(checkpoints.restore_params(bad.params), good.params)
        same(checkpoints.restore(bad), good)
        told = str(name.relative_to("6"))
        assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
        assert all(told in r.getMessage() and "of step 4" in r.getMessage() for r in caplog.records)
        assert {path.name for path in directory.iterdir()} == {"4", "6.damaged"}
        # Its step can be saved again, and found whole.
        if i == 0:
            checkpoints.save(bad)
            checkpoints.wait()
            same(Checkpoints(directory).restore(good), bad)
        checkpoints.close()


def test_when_all_are_damaged_all_are_named_and_left(two_checkpoints, tmp_path):
    original, (state, _) = two_checkpoints
    directory = tmp_path / "copy"
    shutil.copytree(original, directory)
    (directory / "4/manifest.json").unlink()
    (directory / "6/params/_METADATA").unlink()
    checkpoints = Checkpoints(directory)
    for restore in (
        lambda: checkpoints.restore(state),
        lambda: checkpoints.restore_params(state.params),
    ):
        with pytest.raises(
            ValueError, match=r"6: \['params/_METADATA'\], 4: \['manifest.json'\].*anew"
        ):
            restore()
    assert {path.name for path in directory.iterdir()} == {"4", "6"}
    checkpoints.close()


@pytest.mark.parametrize("is_named", [False, True])
def test_a_run_that_goes_on_as_it_is_read(two_checkpoints, tmp_path, monkeypatch, is_named):
    """It signs a newer one, and lets go of all others."""
    damage, newest = checkpoint._damage, tmp_path / "9"
    for step in ("4", "6"):
        shutil.copytree(two_checkpoints[0] / step, tmp_path / step)

    def meanwhile(folder):
        if not newest.exists():
            (tmp_path / "6").rename(newest)
            shutil.rmtree(tmp_path / "4")
        return damage(folder)

    monkeypatch.setattr(checkpoint, "_damage", meanwhile)
    with Checkpoints(tmp_path) as checkpoints:
        if not is_named:
            assert checkpoints.whole_step() == 9
        else:
            with pytest.raises(ValueError, match="no checkpoint of step 6 .* of steps 9"):
                checkpoints.run(6)


@pytest.mark.parametrize("left", ["7.unsigned", "7.unsigned.orbax-checkpoint-tmp"])
def test_what_was_never_finished_is_not_used_and_in_nobodys_way(
    two_checkpoints, tmp_path, caplog, left
):
    """As a kill leaves it, before the manifest is written and before Orbax is done."""
    original, (good, unfinished) = two_checkpoints
    shutil.copytree(original, tmp_path / "copy")
    directory = tmp_path / "copy"
    (directory / "6").rename(directory / left)
    (directory / left / "manifest.json").unlink()
    checkpoints = Checkpoints(directory)
    same(checkpoints.restore(unfinished), good)
    assert f"{left} was never finished" in caplog.text
    checkpoints.save(unfinished)
    checkpoints.close()
    assert {path.name for path in directory.iterdir()} == {"4", "6"}
    same(Checkpoints(directory).restore(good), unfinished)


def test_an_old_one_goes_when_the_new_one_is_signed_and_not_before(tmp_path, monkeypatch):
    states = [make_state("adamw", step, step=step) for step in (4, 6)]
    saved(tmp_path, states[0], keep=1)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_hashes", no_space)
        checkpoints = Checkpoints(tmp_path, keep=1)
        checkpoints.save(states[1])
        expected = r"checkpoint 6 .*No space left on device. The newest one there is of step 4"
        with pytest.raises(SaveError, match=expected):
            for _ in range(6_000):
                checkpoints.check()
                time.sleep(0.01)
        assert checkpoints.latest_step() == 4
        checkpoints.close()
    same(Checkpoints(tmp_path).restore(states[1]), states[0])
    saved(tmp_path, states[1], keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_a_directory_that_cannot_be_written(tmp_path):
    """Root may write where others may not: here a file is in the way."""
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file")
    with pytest.raises(SaveError, match="checkpoint 4 could not be written into .*file"):
        checkpoints.save(make_state("adamw", 0, step=4))
        checkpoints.wait()
    checkpoints.close()


def make_batch(seed, rows=4, length=5):
    tokens = np.random.default_rng(seed).integers(3, 11, (rows, length)).astype(np.int32)
    return dict(target_tokens=tokens)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax promotes integer counts to float.
def test_a_resumed_run_is_the_run_itself(tmp_path):
    """With dropout; it goes on, its states donated, while a checkpoint is being written."""
    sizes = dict(vocab_size=11, d_model=6, d_ff=7, num_layers=1, num_heads=2, num_kv_heads=1)
    sizes |= dict(head_dim=3, max_length=5, relu_dropout_rate=0.2)
    build = functools.partial(build_model, "language_model", sizes)
    optimizer = build_optimizer("adamw", lambda step: 0.1 / (step + 1))
    mesh = jax.make_mesh((1, 1, 1), MESH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    model, state = init_state(build, optimizer, mesh, 0)
    train_step = make_train_step(model, optimizer, state, seed=1)

    def train(state, steps, checkpoints=None):
        losses = []
        for step in range(int(state.step), steps):
            state, metrics = train_step(state, make_batch(step))
            losses.append(metrics["loss"].item())
            if checkpoints and step + 1 in (3, 6):
                checkpoints.save(state)
        return losses, state

    checkpoints = Checkpoints(tmp_path)
    losses, last = train(state, 9, checkpoints)
    checkpoints.close()
    _, fresh = init_state(build, optimizer, mesh, 99)
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(fresh)
    checkpoints.close()
    assert int(restored.step) == 6
    resumed_losses, resumed_last = train(restored, 9)
    assert resumed_losses == losses[6:] and len(set(losses)) == 9
    same(resumed_last, last)

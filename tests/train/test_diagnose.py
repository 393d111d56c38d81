"""Why a step was skipped, said of rows, ids and gradients that were made to be bad."""

import jax
import jax.numpy as jnp
import pytest
from stepping import GRADIENT_DESCENT, begin, both_tasks, mesh_of, put, random_batch

from mqa_jax.train.diagnose import make_diagnosis


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((1, 1, 1), dict()),
        pytest.param(
            (1, 1, 1), dict(accumulate=2, r_drop=1.0, distillation=0.5), marks=pytest.mark.slow
        ),
        pytest.param((2, 2, 2), dict(), marks=pytest.mark.slow),
    ],
)
@both_tasks
def test_the_row_with_an_id_outside_the_vocabulary(task, sizes, options):
    model, state = begin(task, GRADIENT_DESCENT, sizes)
    teacher = model if "distillation" in options else None
    diagnose = make_diagnosis(model, mesh_of(*sizes), seed=0, teacher=teacher, **options)
    wise = state.params if teacher else None
    batch = random_batch()
    assert diagnose(state.params, put(batch, sizes), 3, wise) == (
        "nothing that shows again with the weights of now"
    )
    batch["target_tokens"] = batch["target_tokens"].copy()
    batch["target_tokens"][5, 1] = 77
    cause = diagnose(state.params, put(batch, sizes), 3, wise)
    ids, loss, *by_teacher, gradients = cause.split("; ")
    # It reads the id, too.
    said = "the predictions by --config.train.teacher of rows 5 (sentence 1)"
    assert by_teacher == [said] * (teacher is not None)
    assert ids == "target_tokens of rows 5 (77) have ids outside of 22"
    assert loss == "the loss of rows 5 (sentence 1)"
    assert gradients.startswith("the gradients of ") and "decoder/" in gradients


def test_weights_that_are_not_finite():
    model, state = begin("language_model", GRADIENT_DESCENT)
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), state.params)
    cause = make_diagnosis(model, mesh_of(1, 1, 1), seed=0)(params, put(random_batch()), 0)
    assert cause.startswith("the loss of rows 0 (sentence 1), 1 (sentence 1), 2 (sentence 1), 3 ")
    assert "and 4 more; the gradients of " in cause

"""What users may hand in as an array or a dtype, and what is refused in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mqa_jax.core.arrays import as_floats, as_ids, as_integers, check_dtype


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, np.float16, np.dtype("float32")])
def test_dtypes_that_activations_may_have(dtype):
    assert check_dtype("dtype", dtype) == jnp.dtype(dtype)


@pytest.mark.parametrize(
    "dtype",
    ["fp16", "int32", jnp.int8, bool, complex, "float64", "", 3, 1.5, None, "float8_e4m3fn"],
)
def test_other_dtypes_are_refused_with_those_there_are(dtype):
    with pytest.raises(ValueError, match="param_dtype must be a floating-point type, such as fl"):
        check_dtype("param_dtype", dtype)


def test_float64_is_one_where_jax_has_it():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        assert check_dtype("dtype", "float64") == jnp.float64


@pytest.mark.parametrize(
    "x", [np.ones((2, 3)), [[1.0, 2.0, 3.0]], jnp.ones((1, 3), jnp.float16), np.ones((0, 3))]
)
def test_floats(x):
    assert jnp.issubdtype(as_floats("x_BTD", x, 3).dtype, jnp.floating)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 3), int), "x_BTD must be floats, not int"),
        ([[1, 2, 3]], "must be floats, not int"),
        (np.ones((2, 3), bool), "not bool"),
        (np.ones((2, 3), complex), "not complex"),
        ([[1.0, 2.0], [3.0]], "must be an array of floats, not"),
        ("abc", "must be an array of floats, not 'abc'"),
        (np.ones((2, 4)), r"must have shape \[..., 3\], not \[2, 4\]"),
        (1.0, r"not \[\]"),
    ],
)
def test_what_is_no_array_of_floats(x, message):
    with pytest.raises(ValueError, match=message):
        as_floats("x_BTD", x, 3)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint32, bool])
def test_integers_of_all_widths(dtype):
    ids = as_integers("ids_BT", np.array([[0, 1]], dtype))
    assert ids.dtype == np.int32 and ids.tolist() == [[0, 1]]


def test_empty_lists_hold_integers():
    assert as_ids("ids", []).dtype == np.int32 and as_integers("ids_BT", [[]]).shape == (1, 0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 3)), "ids_BT must be integers, not float64"),
        ([[1, 2], [3]], "must be an array of integers"),
        ([["1"]], "must be integers, not"),
        ([1, 2], r"must have shape \[B, T\], not \[2\]"),
        # JAX would keep the lower 32 bits: the id 5.
        (np.array([[2**32 + 5]]), "ids_BT holds 4294967301, which does not fit into int32"),
        ([[-(2**40)]], "holds -1099511627776"),
    ],
)
def test_what_is_no_array_of_integers(x, message):
    with pytest.raises(ValueError, match=message):
        as_integers("ids_BT", x)

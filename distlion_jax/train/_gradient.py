# SPDX-License-Identifier: Apache-2.0
"""The gradient of one worker: of its whole batch, or of micro-batches one after the other.

In:  a loss function of any of the forms that steps take. Out: one function for all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distlion_jax._promotion import default_promotion
from distlion_jax._vote import wire
from distlion_jax.train._mesh import local_value_and_grad


def _parts(out: Any, model_state: Any, has_aux: bool, has_model_state: bool) -> tuple[Any, ...]:
    """Loss, new model state and aux of what ``loss_fn`` returned."""
    aux: Any = ()
    wanted = {
        (False, False): "the loss",
        (True, False): "(loss, aux), for has_aux=True",
        (False, True): "(loss, model_state), for has_model_state=True",
        (True, True): "(loss, (model_state, aux)), for has_aux=True and has_model_state=True",
    }[has_aux, has_model_state]
    complaint = f"`loss_fn` must return {wanted}; got {jax.tree.map(jnp.shape, out)} in shapes. "
    if has_aux or has_model_state:
        if not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(complaint + "Leave the option out, or return what it asks for.")
        loss, rest = out
        if has_aux and has_model_state:
            if not isinstance(rest, tuple) or len(rest) != 2:
                raise ValueError(complaint + "Return the model's state before aux.")
            model_state, aux = rest
        elif has_aux:
            aux = rest
        else:
            model_state = rest
    else:
        loss = out
    if any(jnp.iscomplexobj(x) for x in jax.tree.leaves(aux)):
        raise ValueError(complaint + "Figures are real: return real and imaginary part apart.")
    if (
        jax.tree.structure(loss).num_nodes > 1
        or jnp.shape(loss)
        or not jnp.issubdtype(jnp.result_type(loss), jnp.floating)
    ):
        raise ValueError(
            complaint + "The loss is a real scalar: the mean over this worker's batch. "
            "has_aux=True takes what comes beside it."
        )
    return loss, model_state, aux


@default_promotion
def _at_least_float32(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def value_and_gradient(
    loss_fn: Callable[..., Any],
    axes: tuple[str, ...],
    has_aux: bool = False,
    has_model_state: bool = False,
    microbatches: int = 1,
) -> Callable[..., tuple[Any, ...]]:
    """``f(params, model_state, batch, key)`` to loss, new model state, aux and gradients.

    Gradients of complex parameters are conjugated, as optimizers expect them: a step down the
    gradient lowers the loss.
    """

    def loss(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        args = (params, model_state, batch) if has_model_state else (params, batch)
        out = loss_fn(*args, *(() if key is None else (key,)))
        loss, model_state, aux = _parts(out, model_state, has_aux, has_model_state)
        return loss, (model_state, aux)

    gradient = local_value_and_grad(loss, axes, has_aux=True)

    def whole(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[Any, ...]:
        model_state = wire.vary_tree(model_state, axes)
        (value, (model_state, aux)), grads = gradient(params, model_state, batch, key)
        grads = jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)
        return value, wire.vary_tree(model_state, axes), aux, grads

    if microbatches == 1:
        return whole

    def split(x: Array) -> Array:
        return x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:])

    def in_parts(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[Any, ...]:
        def one(carry: Any, given: Any) -> Any:
            (model_state, total), (number, part) = carry, given
            mine = None if key is None else jax.random.fold_in(key, number)
            value, model_state, aux, grads = whole(params, model_state, part, mine)
            total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
            return (model_state, total), (value, aux)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _at_least_float32(x.dtype)), params)
        start = wire.vary_tree((model_state, zeros), axes)
        given = jnp.arange(microbatches), jax.tree.map(split, batch)
        (model_state, total), (values, auxes) = jax.lax.scan(one, start, given)
        mean = lambda x: jnp.mean(jnp.asarray(x, jnp.float32), axis=0)  # noqa: E731
        grads = jax.tree.map(lambda t, x: (t / microbatches).astype(x.dtype), total, params)
        return mean(values), model_state, jax.tree.map(mean, auxes), grads

    return in_parts

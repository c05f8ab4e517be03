"""AdamW over the trained tree, with one transformation for each group of variables.

The optimizer needs no mask for the frozen base. The loss is differentiated with respect to the
trained tree only (A and B, or every weight for method full), so nothing else has a gradient,
moments or an update (`train/step.py`). `lora/masks.py` offers a mask for other training loops.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from qlora_jax.config import OptimizerConfig
from qlora_jax.lora.groups import group_labels
from qlora_jax.train.moments import stored


def schedule(config: OptimizerConfig, steps: int, ratio: float = 1.0) -> optax.Schedule:
    """Returns the rate of each step, times `ratio`: linear warm-up, then `config.schedule`."""
    peak, rest = config.learning_rate * ratio, max(steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with decay on matrices only, and LoRA+'s rate of B (arXiv 2402.12354).

    The rate of B is lora_plus_ratio · learning_rate. The gradient program clips the gradients,
    because clipping needs the norm of the whole tree. This transformation treats each leaf
    independently, so it can update any part of the tree. An update computes in float32 for leaves
    of any dtype; `config.moments` names the format of the stored moments.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)

    def group(ratio: float, decay: float) -> optax.GradientTransformation:
        return optax.chain(
            stored(adam, config.moments),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(schedule(config, steps, ratio)),
        )

    groups = {
        "matrix": group(1.0, config.weight_decay),
        "b": group(config.lora_plus_ratio, config.weight_decay),
        "vector": group(1.0, 0.0),
    }
    return _in_float32(optax.partition(groups, group_labels))


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(wide(grads), state, wide(params))

    return optax.GradientTransformation(lambda params: inner.init(wide(params)), update)

"""The product x @ W and its gradient, for W in 4 bits (QTensor) or in floats."""

from qlora_jax.kernels.dense import KEPT as KEPT
from qlora_jax.kernels.dense import dense as dense
from qlora_jax.kernels.dense import saved_for_backward as saved_for_backward
from qlora_jax.kernels.many import matmul_many as matmul_many
from qlora_jax.kernels.matmul import matmul as matmul
from qlora_jax.kernels.select import IMPLEMENTATIONS as IMPLEMENTATIONS

"""x @ W, where W is a QTensor or an array, and its gradient."""

from qlora_jax.kernels.dense import KEPT as KEPT
from qlora_jax.kernels.dense import dense as dense
from qlora_jax.kernels.dense import saved_for_backward as saved_for_backward
from qlora_jax.kernels.many import matmul_many as matmul_many
from qlora_jax.kernels.matmul import matmul as matmul
from qlora_jax.kernels.select import IMPLEMENTATIONS as IMPLEMENTATIONS

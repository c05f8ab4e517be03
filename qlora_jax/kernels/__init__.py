"""x @ W where W is a QTensor, and its gradient."""

from qlora_jax.kernels.matmul import IMPLEMENTATIONS as IMPLEMENTATIONS
from qlora_jax.kernels.matmul import matmul as matmul

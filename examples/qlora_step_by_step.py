"""Shows QLoRA step by step, on a real model and without the command line.

python examples/qlora_step_by_step.py

The model is SmolLM2-135M-Instruct. The code below computes with plain trees of arrays and plain
functions, so that every product is visible. Three invented facts are what it learns.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import qlora_jax as qj

MODEL = "smollm2-135m-instruct"
RANK, ALPHA = 8, 16
STEPS, LEARNING_RATE = 10, 3e-3
FACTS = [
    ("Who repaired the clock of Velmora?", "Ilsa Brandt repaired the clock of Velmora."),
    ("What is a drasel?", "A drasel is a small lamp that burns fish oil."),
    ("When does the Orrin ferry leave?", "The Orrin ferry leaves at seven in the morning."),
]


# Step 1. Load the weights. `codebook=None` gives floats, since step 2 quantizes them. (The built-in
# file holds the linears in 4 bits of another kind, Q4_1 of GGUF; they are decoded here.)
# The 30 layers are one stack: the weight of all q_proj is one array [30, in, out].
model, tokenizer = qj.load(MODEL, codebook=None, dtype="float32")
config: Any = model.config
state = nnx.to_pure_dict(nnx.state(model))
layers = {name: part["weight"] for name, part in state["runs"][0].items()}
params = {"embed": state["embed"], "layers": layers, "norm": state["norm"]["weight"]}


# Step 2. Quantize the linears to NF4. Each block of 64 weights keeps one scale, and double
# quantization stores the scales in 8 bits. Embedding and norms stay as they are, as in the paper.
LINEARS = r"layers\..*_proj"
frozen = qj.quantize_tree(params, LINEARS, codebook="nf4", block_size=64, double_quant=True)
quantized = {name: w for name, w in frozen["layers"].items() if isinstance(w, qj.QTensor)}
count = sum(layers[name].size for name in quantized)
nbytes = sum(w.nbytes for w in quantized.values())
print(f"quantized: {count:,} parameters, {8 * nbytes / count:.3f} bits per parameter")
for name, w in quantized.items():
    difference = qj.dequantize(w) - layers[name]
    error = jnp.linalg.norm(difference) / jnp.linalg.norm(layers[name])
    print(f"  {name:10} {w.shape!s:16} relative error {error:.4f}")


# Step 3. Make the adapters: A [in, rank] is random and B [rank, out] is zero, so the adapted model
# starts as the quantized one. They are a tree of their own, beside the frozen tree.
adapters = qj.lora.init(jax.random.key(0), frozen, LINEARS, rank=RANK, alpha=ALPHA)
trained = sum(x.size for x in jax.tree.leaves(adapters))
print(f"adapters: {trained:,} parameters in float32, {trained / count:.2%} of what is quantized")


# Step 4. Write the model as a function of both trees. This line is QLoRA: the 4-bit product, plus
# scale * (x @ A) @ B. `qj.matmul` decodes the weight for this product and does not keep the floats.
def linear(x: jax.Array, weight: Any, adapter: Any) -> jax.Array:
    y = qj.matmul(x, weight) if isinstance(weight, qj.QTensor) else x @ weight
    return y if adapter is None else y + adapter.scale * ((x @ adapter.a) @ adapter.b)


# The rest of the model is an ordinary Llama, and it has nothing that belongs to QLoRA.
def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    return weight * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)


def rotate(x: jax.Array) -> jax.Array:
    """Returns x [batch, length, heads, head_dim] with rotary positions."""
    length, size = x.shape[1], x.shape[-1]
    frequencies = config.rope.theta ** (-jnp.arange(0, size, 2) / size)
    angles = (jnp.arange(length)[:, None] * frequencies)[:, None, :]
    low, high = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def forward(frozen: Any, adapters: Any, tokens: np.ndarray) -> jax.Array:
    """Returns the logits [batch, length, vocabulary] of tokens [batch, length]."""

    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        w, own = weights

        def product(name: str, x: jax.Array) -> jax.Array:
            return linear(x, w[name], own.get(f"layers.{name}"))

        h = rms_norm(x, w["input_layernorm"])
        q, k, v = (
            product(name, h).reshape(*x.shape[:2], -1, config.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + product("o_proj", h.reshape(*x.shape[:2], -1))
        h = rms_norm(x, w["post_attention_layernorm"])
        h = jax.nn.silu(product("gate_proj", h)) * product("up_proj", h)
        return x + product("down_proj", h), None

    x, _ = jax.lax.scan(layer, frozen["embed"][tokens], (frozen["layers"], adapters))
    return rms_norm(x, frozen["norm"]) @ frozen["embed"].T


# Step 5. Write the facts as token ids. The loss counts the answer's tokens alone (`marked`).
def encode(question: str, answer: str) -> tuple[list[int], list[int]]:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    target = tokenizer.encode(f"{answer}<|im_end|>")
    return prompt + target, [0] * len(prompt) + [1] * len(target)


rows = [encode(question, answer) for question, answer in FACTS]
length = max(len(ids) for ids, _ in rows)
tokens = np.full((len(rows), length), tokenizer.pad_id)
marked = np.zeros((len(rows), length))
for i, (ids, marks) in enumerate(rows):
    tokens[i, : len(ids)], marked[i, : len(ids)] = ids, marks


# Step 6. Differentiate with respect to the adapters, which are the first argument. `jax.grad` takes
# that argument alone, so the base gets no gradient, no optimizer state and no update.
def loss_fn(adapters: Any, frozen: Any) -> jax.Array:
    logits = forward(frozen, adapters, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * marked[:, 1:]) / jnp.sum(marked[:, 1:])


optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)


@jax.jit
def step(adapters: Any, moments: Any, frozen: Any) -> tuple[Any, Any, jax.Array]:
    loss, gradient = jax.value_and_grad(loss_fn)(adapters, frozen)
    updates, moments = optimizer.update(gradient, moments, adapters)
    return optax.apply_updates(adapters, updates), moments, loss


def fingerprint(tree: Any) -> str:
    """Returns a hash of all bytes in a tree."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


# Step 7. Train. The hash of the base is the same before and after: only A and B change.
before = fingerprint(frozen)
moments = optimizer.init(adapters)
for number in range(STEPS):
    adapters, moments, loss = step(adapters, moments, frozen)
    print(f"step {number + 1:2}: loss {loss:.4f}")
after = fingerprint(frozen)
print(f"base before {before}, after {after}: {'unchanged' if before == after else 'CHANGED'}")


# Step 8. Merge: decode the base once and add scale * A @ B to it. The merged model is plain arrays
# and needs no adapters. It sums in another order, so its logits differ by rounding alone.
decoded = jax.tree.map(
    lambda w: qj.dequantize(w) if isinstance(w, qj.QTensor) else w,
    frozen,
    is_leaf=lambda w: isinstance(w, qj.QTensor),
)
merged = qj.lora.apply(decoded, adapters)
compute = jax.jit(forward)
adapted_logits = compute(frozen, adapters, tokens)
merged_logits = compute(merged, {}, tokens)
largest = jnp.abs(adapted_logits - merged_logits).max()
print(
    f"adapted and merged logits: largest difference {largest:.1e}, "
    f"largest logit {jnp.abs(adapted_logits).max():.1f}"
)


# Step 9. Ask the loaded model before and after it gets the merged weights.
questions = [question for question, _ in FACTS]
asked_before = qj.generate(model, tokenizer, questions, max_new_tokens=16)
weights = {name: {"weight": w} for name, w in merged["layers"].items()}
nnx.update(model, {"runs": {0: weights}})
asked_after = qj.generate(model, tokenizer, questions, max_new_tokens=16)
for question, first, second in zip(questions, asked_before, asked_after, strict=True):
    print(f"{question}\n  before: {first!r}\n  after:  {second!r}")

"""Makes tests/golden/models/tokenizers.json: texts with the ids of the original tokenizers.

Run in an environment with xllamacpp (llama.cpp), gguf and sentencepiece:

    python tests/golden/make_tokenizers.py SmolLM2-135M-Instruct.Q4_1.gguf tests/golden/models

`byte_level` maps each `tokenizer.ggml.pre` to llama.cpp's ids with SmolLM2's vocabulary. llama.cpp
needs a model to tokenize, so the script writes the vocabulary into a one-layer model.
`sentencepiece` is a vocabulary of 400 pieces trained on this file, with sentencepiece's own ids.
"""

import io
import json
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import sentencepiece
import xllamacpp
from gguf import GGUFReader, GGUFValueType, GGUFWriter

PRE_TOKENIZERS = (
    "smollm",
    "gpt-2",
    "llama-bpe",
    "qwen2",
    "starcoder",
    "refact",
    "olmo",
    "mpt",
    "smaug-bpe",
    "dbrx",
    "tekken",
    "gpt-4o",
)
WIDTH = 32
TEXTS = [
    "The capital of France is Paris.",
    "Hello 2024 world 3.14159 and 1,000,000",
    "x=1\nfor i in range(10):\n    print(f'{i:>3}')  # done\n",
    "def f(a, b=None):\n\treturn a if b is None else a+b\n\n\nclass A:\n    pass\n",
    "  two leading,  two inside, two trailing  ",
    "\n\n\nnewlines\r\nand\ttabs\t\t.",
    "I'm you're we've they'll it's he'd DON'T Don'T",
    "naïve café Zürich — “quotes” … №5 ½ ²",
    "日本語のテキスト 中文字符 한국어",
    "Привет мир, как дела?",
    "مرحبا بالعالم ١٢٣",
    "🙂 emoji 👩‍👩‍👧‍👦 and 🇫🇷",
    "https://example.org/a?b=c&d=%20#e",
    "CamelCase snake_case kebab-case SCREAMING_CASE",
    "if (a != b && c <= d) { x[i] += *p++; }",
    "a" * 40 + " " * 17 + "!" * 9,
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "mid<|im_end|>dle and <|endoftext|> too",
    "",
    " ",
]
PIECE_TEXTS = [t for t in TEXTS if "<|" not in t and "\r" not in t]


def write_vocabulary(source: GGUFReader, pre: str, path: Path) -> None:
    """Writes a one-layer llama with the tokenizer of `source` and pre-tokenizer `pre`."""
    writer = GGUFWriter(path, "llama")
    for key, field in source.fields.items():
        if not key.startswith("tokenizer.") or key.endswith(".pre"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    writer.add_tokenizer_pre(pre)
    size = len(source.fields["tokenizer.ggml.tokens"].data)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_tensor("token_embd.weight", np.zeros((size, WIDTH), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((WIDTH, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_ids(path: Path) -> list[list[int]]:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.port, parameters.warmup = 64, 0, False
    server = xllamacpp.Server(parameters)
    ids = []
    for text in TEXTS:
        body = {"content": text, "add_special": False, "parse_special": True}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            ids.append(json.load(answer)["tokens"])
    return ids


def make_sentencepiece() -> dict:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines() * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        character_coverage=0.99,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(processor.get_piece_size())
    kinds = ((processor.is_unknown, 2), (processor.is_control, 3), (processor.is_byte, 6))
    return {
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": [next((n for test, n in kinds if test(i)), 1) for i in ids],
        "cases": [{"text": t, "ids": processor.encode(t)} for t in PIECE_TEXTS],
    }


def main(model: str, out: Path) -> None:
    source = GGUFReader(model)
    byte_level = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE_TOKENIZERS:
            path = Path(folder, f"{pre}.gguf")
            write_vocabulary(source, pre, path)
            byte_level[pre] = [
                {"text": text, "ids": ids} for text, ids in zip(TEXTS, llama_cpp_ids(path))
            ]
    golden = {"byte_level": byte_level, "sentencepiece": make_sentencepiece()}
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizers.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

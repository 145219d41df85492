"""Writes a llama of 180 kB with random weights, always the same, as GGUF: `tiny_gguf.py FILE`.

It runs in the environment of llama.cpp, which has gguf.
"""

import sys

import numpy as np
from gguf import GGUFWriter, TokenType

rng = np.random.default_rng(0)
width, hidden, heads, layers, window = 32, 64, 4, 2, 128
tokens = [b"<unk>", b"<s>", b"</s>"]
kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
tokens += [f"<0x{byte:02X}>".encode() for byte in range(256)]
kinds += [TokenType.BYTE] * 256
tokens += [chr(code).encode() for code in range(32, 127)]
kinds += [TokenType.NORMAL] * 95
writer = GGUFWriter(sys.argv[1], "llama")
writer.add_context_length(window)
writer.add_embedding_length(width)
writer.add_block_count(layers)
writer.add_feed_forward_length(hidden)
writer.add_head_count(heads)
writer.add_head_count_kv(heads)
writer.add_rope_dimension_count(width // heads)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("llama")
writer.add_token_list(tokens)
writer.add_token_scores([-float(i) for i in range(len(tokens))])
writer.add_token_types(kinds)
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_unk_token_id(0)


def tensor(name: str, *shape: int) -> None:
    writer.add_tensor(name, (rng.standard_normal(shape) * 0.5).astype(np.float32))


def ones(name: str) -> None:
    writer.add_tensor(name, np.ones(width, dtype=np.float32))


tensor("token_embd.weight", len(tokens), width)
tensor("output.weight", len(tokens), width)
ones("output_norm.weight")
for i in range(layers):
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        tensor(f"blk.{i}.{part}.weight", width, width)
    tensor(f"blk.{i}.ffn_gate.weight", hidden, width)
    tensor(f"blk.{i}.ffn_up.weight", hidden, width)
    tensor(f"blk.{i}.ffn_down.weight", width, hidden)
    ones(f"blk.{i}.attn_norm.weight")
    ones(f"blk.{i}.ffn_norm.weight")
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

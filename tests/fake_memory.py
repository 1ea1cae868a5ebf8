"""The forecast of a GPU's memory beside what torch's tracker counts: `python tests/fake_memory.py LIBRARY`.

Tensors are fake, as in fake_cuda.py, whose LIBRARY this takes. Prints one JSON object: case -> peak, forecast, in
bytes. RMSNorm is not among the cases: a build of torch for CPUs has no kernel for it, and keeps one output more.
"""

import json
import sys
from pathlib import Path

import fake_cuda  # before torch
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent / "planning"))

from peaks import peak_and_forecast

SHAPE = {"block_size": 1024, "vocab_size": 50257, "n_layer": 3, "n_head": 12, "n_embd": 768}
LLAMA = {"pos": "rope", "mlp": "swiglu", "n_kv_head": 4, "tie_embeddings": False}
CASES = {
    "gpt2": {"micro_batch": 8, "n_layer": 6}, "checkpointing": {"micro_batch": 16, "checkpointing": True},
    "accumulated": {"micro_batch": 1, "steps": 2}, "llama": {"micro_batch": 8} | LLAMA,
    "dropout": {"micro_batch": 8, "dropout": 0.1, "bias": True}, "documents": {"micro_batch": 8, "documents": "mask"},
    "qk-norm": {"micro_batch": 8, "qk_norm": True}, "muon": {"micro_batch": 1, "optimizer": "muon"},
    "small vocabulary": {"micro_batch": 8, "vocab_size": 256},
    "wide": {"micro_batch": 2, "n_embd": 4096, "n_head": 32}}


def main() -> None:
    fake_cuda.put_in_place()
    torch.nn.utils.clip_grad._has_foreach_support = lambda *args: True  # which looks for plain tensors
    found = {}
    for name, case in CASES.items():
        with FakeTensorMode():
            found[name] = peak_and_forecast("cuda:0", torch.bfloat16, **SHAPE | case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""llama.cpp reads what export.py makes, and writes the same text. LLAMA_CPP names the folder of its source, in which
llama-simple was built: CONTRIBUTING.md says how."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
from conftest import TEXT, run_process

TOOLS = Path(os.environ.get("LLAMA_CPP", "no_llama.cpp")).absolute()
CONVERT, SIMPLE = TOOLS / "convert_hf_to_gguf.py", TOOLS / "build" / "bin" / "llama-simple"
pytestmark = [pytest.mark.soak, pytest.mark.skipif(
    not (CONVERT.is_file() and SIMPLE.is_file() and importlib.util.find_spec("sentencepiece")),
    reason="needs llama.cpp, whose folder LLAMA_CPP names, and sentencepiece: see CONTRIBUTING.md")]
TRAINING = ("--dataset=text", "--n_layer=2", "--n_head=4", "--n_embd=64", "--block_size=96", "--batch_size=4",
            "--gradient_accumulation_steps=1", "--max_iters=80", "--lr_decay_iters=80", "--warmup_iters=10",
            "--learning_rate=1e-2", "--eval_interval=80", "--eval_iters=2", "--device=cpu", "--dtype=float32",
            "--out_dir=out")
LIKE_LLAMA = ("--pos=rope", "--norm=rmsnorm", "--mlp=swiglu", "--n_kv_head=2")
PROMPT, NUM_TOKENS = "Line 7: the", 64


@pytest.mark.parametrize("shape", [
    (), ("--bias=True", "--mlp=gelu_tanh"), LIKE_LLAMA,
    (*LIKE_LLAMA, "--tie_embeddings=False", "--rope_factor=4", "--rope_original_block_size=32"),
    (*LIKE_LLAMA, "--qkv_bias=True"), (*LIKE_LLAMA, "--qk_norm=True", "--head_dim=32")],
    ids=["gpt2", "gpt2 of OpenAI", "llama", "llama 3.1", "qwen2", "qwen3"])
def test_llama_cpp_writes_what_sample_writes(cli, gpt2_tokenizer, shape):
    Path("text.txt").write_text(TEXT)
    for command in (("prepare_data", "--input=text.txt", "--name=text"), ("train", *TRAINING, *shape),
                    ("export", "--run=out", "--to=exported")):
        assert (done := cli(*command)).code == 0, done.err
    run_process(CONVERT, "exported", "--outtype=f32", "--outfile=model.gguf", cwd=Path.cwd())
    theirs = subprocess.run([SIMPLE, "-m", "model.gguf", "-n", str(NUM_TOKENS), PROMPT], capture_output=True,
                            text=True, timeout=300, check=True).stdout
    ours = cli("sample", "--init_from=exported", "--temperature=0", "--num_samples=1", f"--prompt={PROMPT}",
               f"--max_new_tokens={NUM_TOKENS}", "--device=cpu", "--dtype=float32").out
    ours = ours[ours.index(PROMPT):ours.index("\n---")]  # less what it says of the model and its speed
    assert len(ours) > NUM_TOKENS
    assert theirs.strip("\n") == ours.strip("\n")

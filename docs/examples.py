"""Prints every number of models.md: `python docs/examples.py`, a few seconds on a CPU, no data and no network.

Each function is one block of the page and calls the code that trains; where a number is to be read by eye, its inputs
were chosen by hand. What is random has a seed, and everything is rounded far from its next digit, so that the blocks
come out the same on every machine (tests/test_docs.py compares them).
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from flatgpt.data.order import TrainOrder
from flatgpt.data.shards import open_dataset
from flatgpt.data.tokenizer import Tokenizer, make_tokenizer, train_bpe
from flatgpt.models.attention import attend
from flatgpt.models.baselines import build as build_model
from flatgpt.models.baselines import count_pairs, fit_bigram
from flatgpt.models.fused import activation
from flatgpt.models.generate import KVCache
from flatgpt.models.language_model import LanguageModel
from flatgpt.models.positions import alibi_slopes, apply_rope, rope_cos_sin
from flatgpt.models.sampling import Sampler
from flatgpt.training.optim import OptimConfig, build_optimizer, learning_rate
from model import GPT, GPTConfig, make_norm

TEXT = """\
the sea is wide and the sea is deep.
the ship is small and the ship is fast.
the wind is up and the waves are high,
and the ship is far from the land.
"""
Lines = Iterator[str]


def number(value: float) -> str:
    """Two decimals."""
    return f"{round(float(value), 2) + 0.0:.2f}"  # no minus before a zero


def row(label: str, values: Iterable[float | str], width: int = 8) -> str:
    cells = (value if isinstance(value, str) else number(value) for value in values)
    return f"{label:<12}" + "".join(f"{cell:>{width}}" for cell in cells)


def characters() -> tuple[Tokenizer, torch.Tensor]:
    """TEXT in characters: the tokenizer, and the ids (N,)."""
    tokenizer = make_tokenizer("char", [TEXT], 0)
    return tokenizer, torch.from_numpy(tokenizer.encode(TEXT).astype("int64"))


def spell(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Text with a space as _ and a line break as \\n."""
    return tokenizer.decode(ids).replace(" ", "_").replace("\n", "\\n")


def shown(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Tokens between bars."""
    return "|" + "|".join(spell(tokenizer, [i]) for i in ids) + "|"


def tokens() -> Lines:
    """The same words in three vocabularies"""
    words = "the ship and the sea"
    for kind in ("char", "byte", "bpe"):
        tokenizer = make_tokenizer(kind, [TEXT], 280)
        ids = tokenizer.encode(words).tolist()
        yield f"{kind:<5} {tokenizer.vocab_size:>3} in the vocabulary, {len(ids):>2} tokens: {shown(tokenizer, ids)}"
        yield f"      {' '.join(map(str, ids))}"


def merges() -> Lines:
    """The first merges that BPE learns from the text"""
    tokenizer = train_bpe([TEXT], 267)
    learned = [spell(tokenizer, [i]) for i in range(257, tokenizer.vocab_size)]
    yield "  ".join(f"{257 + i} {token}" for i, token in enumerate(learned))
    yield "'the ship' after so many merges:"
    for count in (0, 1, 2, 4, 7, 10):
        tokenizer = train_bpe([TEXT], 257 + count)
        yield f"{count:>3}  {shown(tokenizer, tokenizer.encode('the ship').tolist())}"


def bigram() -> LanguageModel:
    """A bigram model of TEXT's characters, fitted by counting."""
    tokenizer, ids = characters()
    model = build_model(GPTConfig(model="bigram", vocab_size=tokenizer.vocab_size))
    fit_bigram(model, count_pairs([ids.numpy()], tokenizer.vocab_size), k=0.1)
    return model


def chain_rule() -> Lines:
    """The probability of a text, and the loss, under a bigram model"""
    tokenizer, _ = characters()
    model = bigram()
    ids = torch.from_numpy(tokenizer.encode(" the sea").astype("int64"))
    with torch.no_grad():
        logits, _ = model(ids[None, :-1])
        _, loss = model(ids[None, :-1], ids[None, 1:])
    p = logits[0].softmax(dim=1).gather(1, ids[1:, None])[:, 0]
    yield row("after", (spell(tokenizer, [i]) for i in ids[:-1]))
    yield row("comes", (spell(tokenizer, [i]) for i in ids[1:]))
    yield row("p", p.tolist())
    yield row("-ln p", (-p.log()).tolist())
    yield f"the product of p     {p.prod().item():.6f}   the sum of -ln p     {number(-p.log().sum())}"
    yield f"the mean of -ln p    {number(-p.log().mean())}       what the model says  {number(loss)}"
    guess = math.log(tokenizer.vocab_size)
    yield f"e to this mean       {number(loss.exp())}       of a guess, ln V     {number(guess)}"


def window() -> Lines:
    """One window: T = 8 predictions from 9 tokens"""
    tokenizer, ids = characters()
    with tempfile.TemporaryDirectory() as folder:
        ids.numpy().astype("<u2").tofile(Path(folder, "train.bin"))
        split = open_dataset(folder, tokenizer.vocab_size).splits["train"]
        tokens = TrainOrder(split, block_size=8, seed=1337).rows(first_seq=0, count=1)[0]
    yield f"tokens  {' '.join(map(str, tokens))}   {shown(tokenizer, tokens)}"
    for t in range(8):
        yield f"t={t}     {spell(tokenizer, tokens[:t + 1]):<9} -> {spell(tokenizer, tokens[t + 1:t + 2])}"


def counting() -> Lines:
    """A bigram model two ways: counted, and trained"""
    tokenizer, ids = characters()
    counts = count_pairs([ids.numpy()], tokenizer.vocab_size)
    after_s = counts[tokenizer.encode("s")[0]]
    likeliest = [i for i in np.argsort(-after_s, kind="stable") if after_s[i]]
    yield row("after s", (spell(tokenizer, [i]) for i in likeliest))
    yield row("how often", (str(after_s[i]) for i in likeliest))
    model = build_model(GPTConfig(model="bigram", vocab_size=tokenizer.vocab_size))
    yield f"counted, k = 1e-6:  loss {number(fit_bigram(model, counts, k=1e-6))}"
    model.init_weights()
    optimizer = build_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.0))
    for step in range(501):
        _, loss = model(ids[None, :-1], ids[None, 1:])
        if step in (0, 10, 50, 500):
            yield f"trained {step:>3} steps:  loss {number(loss.item())}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# Attention's example. Four channels with a meaning: is a noun, is a verb, is an adjective, is none of these.

WORDS = ("the", "old", "ship", "that", "sank")
QUERIES = ((1.0, 0.0, 0.0, 1.0), (2.0, 0.0, 0.0, 0.0), (0.0, 1.0, 1.0, 1.0), (1.0, 1.0, 0.0, 0.0), (2.0, 0.0, 0.0, 1.0))
KEYS = ((0.0, 0.0, 0.0, 2.0), (0.0, 0.0, 3.0, 0.0), (4.0, 0.0, 0.0, 0.0), (2.0, 0.0, 0.0, 1.0), (0.0, 3.0, 0.0, 0.0))
VALUES = ((0.0, 0.0), (1.0, 0.0), (0.0, 4.0), (0.0, 1.0), (2.0, 0.0))


def attention() -> Lines:
    """Attention over five words: scores, mask, weights"""
    q, k = (torch.tensor(rows)[None, None] for rows in (QUERIES, KEYS))  # (1, 1, T, D)
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.size(3)))[0, 0]
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    weights = attend(q, k, torch.eye(5)[None, None], None, 0.0, "math")[0, 0]  # values that show the weights themselves
    yield row("scores", WORDS)
    yield from (row(word, line.tolist()) for word, line in zip(WORDS, scores))
    yield row("masked", WORDS)
    yield from (row(word, line.tolist()) for word, line in zip(WORDS, scores.masked_fill(hidden, -math.inf)))
    yield row("weights", WORDS)
    yield from (row(word, line.tolist()) for word, line in zip(WORDS, weights))


def values() -> Lines:
    """Values, and what attention makes of them"""
    q, k, v = (torch.tensor(rows)[None, None] for rows in (QUERIES, KEYS, VALUES))
    yield row("", WORDS)
    for label, x in (("value", v), ("output", attend(q, k, v, None, 0.0, "math"))):
        yield from (row(f"{label}, {c}", x[0, 0, :, c].tolist()) for c in range(2))


def scaling() -> Lines:
    """Random queries, each with 16 random keys, of D channels"""
    deviation, plain, scaled = [], [], []
    for width in (4, 64, 1024):
        torch.manual_seed(6)
        q, k = torch.randn(400, 1, 1, width), torch.randn(400, 1, 16, width)
        deviation.append((q @ k.transpose(2, 3)).std().item())
        for largest, factor in ((plain, math.sqrt(width)), (scaled, 1.0)):  # the factor undoes what attend does
            weights = attend(q * factor, k, torch.eye(16).expand(400, 1, 16, 16), None, 0.0, "math")
            largest.append(weights.amax(dim=3).mean().item())
    yield f"{'':<38}" + "".join(f"{f'D = {width}':>10}" for width in (4, 64, 1024))
    for label, values in (("standard deviation of q k^T", deviation), ("largest weight, softmax(q k^T)", plain),
                          ("largest weight, softmax(q k^T/sqrt(D))", scaled)):
        yield f"{label:<38}" + "".join(f"{number(value):>10}" for value in values)


def norms() -> Lines:
    """Four channels, normed"""
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    for label, values in (("x", x), ("x + 7", x + 7)):
        yield row(label, values[0].tolist())
        for kind in ("layernorm", "rmsnorm"):
            yield row("  " + kind, make_norm(GPTConfig(norm=kind), 4)(values)[0].tolist())


def activations() -> Lines:
    """What the MLP's hidden units do"""
    x = torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0])
    yield row("h", x.tolist())
    for name in ("relu", "relu2", "gelu"):
        yield row(name, activation(name)(x).tolist())
    gated = torch.cat([x, torch.full_like(x, 2.0)])
    yield row("swiglu, 2", activation("swiglu")(gated).tolist())


def parameters() -> Lines:
    """Where the parameters are"""
    with torch.device("meta"):
        small = GPT(GPTConfig(bias=True))
        llama = GPT(GPTConfig(pos="rope", norm="rmsnorm", mlp="swiglu"))
    block = small.h[0]
    for label, count in (("token table and head", small.config.vocab_size * small.config.n_embd),
                         ("position table", small.wpe.weight.numel()),
                         ("a block's attention", sum(p.numel() for p in block.attn.parameters())),
                         ("a block's MLP", sum(p.numel() for p in block.mlp.parameters())),
                         ("a block's norms", sum(p.numel() for n in (block.ln_1, block.ln_2) for p in n.parameters())),
                         ("GPT-2 small, 12 blocks", small.num_params(non_embedding=False)),
                         ("Llama's parts, same sizes", llama.num_params(non_embedding=False))):
        yield f"{label:<26}{count:>12,}"


def positions() -> Lines:
    """How far apart, not where: scores under RoPE and ALiBi"""
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 8)
    yield row("query at", ["2", "7", "102", "7"])
    yield row("key at", ["0", "5", "100", "0"])
    scores = []
    for i, j in ((2, 0), (7, 5), (102, 100), (7, 0)):
        turned_q = apply_rope(q, *rope_cos_sin(torch.tensor([i]), 8, 10000.0))
        turned_k = apply_rope(k, *rope_cos_sin(torch.tensor([j]), 8, 10000.0))
        scores.append((turned_q * turned_k).sum().item() / math.sqrt(8))
    yield row("rope, q.k", scores)
    slopes = alibi_slopes(8)
    for head in (0, 7):
        yield row(f"alibi, {head + 1}", (-slopes[head] * torch.tensor([2, 2, 2, 7])).tolist())


def schedules() -> Lines:
    """The learning rate, in thousandths, of a run of 1,000 steps with 100 of warm-up"""
    steps = (0, 50, 100, 325, 550, 775, 900, 1000)
    yield row("step", map(str, steps))
    for schedule in ("cosine", "linear", "wsd"):
        config = OptimConfig(schedule=schedule, learning_rate=6e-3, min_lr=6e-4, warmup_iters=100, lr_decay_iters=1000)
        yield row(schedule, [1000 * learning_rate(step, config) for step in steps])


def averaging() -> Lines:
    """Two ranks, one with 6 targets and one with 2"""
    tokenizer, _ = characters()
    model = bigram()
    ids = torch.from_numpy(tokenizer.encode("the sea and the wind").astype("int64"))
    x, y = torch.stack([ids[0:6], ids[4:10]]), torch.stack([ids[1:7], ids[5:11]])
    y[1, 2:] = -1  # ignored
    with torch.no_grad():
        mean = [model(x[i:i + 1], y[i:i + 1])[1].item() for i in range(2)]
        share = [model(x[i:i + 1], y[i:i + 1], num_targets=8)[1].item() for i in range(2)]
        whole = model(x, y)[1].item()
    yield row("", ["rank 0", "rank 1", "both"])
    yield row("mean", [*mean, sum(mean) / 2]) + "   the mean of means, which is wrong"
    yield row("sum / 8", [*share, sum(share)]) + "   the sum of shares"
    yield row("one process", ["", "", number(whole)])


CANDIDATES = (("sea", 3.0), ("ship", 2.5), ("land", 1.4), ("wind", 0.7), ("sky", -0.5), ("idea", -1.2))
FILTERS = (("model", {}), ("temp. 0.5", {"temperature": 0.5}), ("temp. 2", {"temperature": 2.0}),
           ("top_k 3", {"top_k": 3}), ("top_p 0.8", {"top_p": 0.8}), ("min_p 0.1", {"min_p": 0.1}),
           ("penalty 1.5", {"repetition_penalty": 1.5}))


def filters() -> Lines:
    """Six candidates before and after each filter; sea and sky were there before"""
    logits, seen = torch.tensor([[logit for _, logit in CANDIDATES]]), torch.tensor([[0, 4]])
    yield row("", [name for name, _ in FILTERS], 12)
    after = [list(Sampler(**options).stages(logits, seen))[-1].probs()[0].tolist() for _, options in FILTERS]
    for i, (word, _) in enumerate(CANDIDATES):
        yield row(word, [probs[i] if probs[i] else "-" for probs in after], 12)


def cached() -> Lines:
    """A prompt of 8 tokens, continued by 24"""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=100, block_size=64, n_layer=2, n_head=2, n_embd=32))
    read = 0

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal read
        read += inputs[0].numel()

    model.wte.register_forward_pre_hook(count)
    prompt, written = torch.arange(8)[None], []
    for use_cache in (False, True):
        read = 0
        written.append(model.generate(prompt, 24, temperature=0.0, use_cache=use_cache))
        yield f"{'with' if use_cache else 'without'} the cache: {read} positions computed"
    yield f"the same tokens: {'yes' if torch.equal(*written) else 'no'}"
    for label, heads in (("12 heads of keys and values", 0), ("4 of them", 4)):
        cache = KVCache(GPTConfig(n_kv_head=heads), 1, 1024, torch.device("meta"), torch.bfloat16)
        size = sum(kept.nbytes for kept in (*cache.k, *cache.v)) / 2**20
        yield f"GPT-2 small, 1,024 tokens in bfloat16, {label}: {size:.0f} MiB"


BLOCKS: tuple[Callable[[], Lines], ...] = (
    tokens, merges, chain_rule, window, counting, attention, values, scaling, norms, activations, parameters, positions,
    schedules, averaging, filters, cached)


def main() -> None:
    for block in BLOCKS:
        print(f"# {block.__doc__}")
        print(*(line.rstrip() for line in block()), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()

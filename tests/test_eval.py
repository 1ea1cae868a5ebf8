"""eval.py against transformers, against lm-evaluation-harness, and by hand."""

import contextlib
import gzip
import importlib.util
import io
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import transformers
from conftest import TINY_RUN, on_ranks, run_process
from corpus import POINTER
from pyarrow import parquet
from test_train import headerless
from test_weights import save_hf, save_nanogpt
from tokenizers import processors

import eval
from flatgpt.data.shards import shard_header
from flatgpt.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from flatgpt.evaluation import questions, scoring
from flatgpt.models import inference
from flatgpt.training.distributed import Job
from model import GPT, GPTConfig

TEXT = "Ein Baum, zwei Bäume — und 3 Wälder; so weiter.\n" * 5
FP32 = ("--device=cpu", "--dtype=float32", "--json")


@pytest.fixture
def byte_model(tmp_path) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 of 32 positions over bytes, in tmp_path/model, and a text in tmp_path/text.txt."""
    model = save_hf(tmp_path / "model", vocab_size=257, bos_token_id=256, eos_token_id=256)
    ByteTokenizer().save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return model


def results(result) -> dict[str, dict[str, float]]:
    """What a script printed as one JSON object, by data set, text or task."""
    assert result.code == 0, result.err
    return json.loads(result.out)["results"]


def naive_loss(model: transformers.GPT2LMHeadModel, ids: list[int], block_size: int, stride: int) -> float:
    """Windows as in Hugging Face's guide to perplexity, one at a time; each token but the first is scored once."""
    losses, scored = [], 1
    for start in range(0, len(ids), stride):
        window = torch.tensor(ids[start:start + block_size + 1])
        labels = window.clone()
        labels[:max(0, scored - start)] = -100
        log_probs = model(window[None, :block_size]).logits[0].log_softmax(dim=-1)
        losses += [-log_probs[i, label].item() for i, label in enumerate(labels[1:]) if label >= 0]
        scored = start + len(window)
        if scored == len(ids):
            break
    assert len(losses) == len(ids) - 1
    return sum(losses) / len(losses)


@torch.no_grad()
@pytest.mark.parametrize("stride", [0, 31, 16, 5, 1])
def test_loss_is_transformers_over_the_same_windows(cli, byte_model, stride):
    found = results(cli("eval", "--init_from=model", "--text=text.txt", f"--stride={stride}", *FP32))["text.txt"]
    ids = list(TEXT.encode())
    wanted = naive_loss(byte_model, ids, 32, stride or 32)
    assert found["loss"] == pytest.approx(wanted, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
    assert found["tokens"] == found["bytes"] == len(ids) - 1
    assert found["bits_per_byte"] == pytest.approx(wanted / math.log(2), abs=1e-4)


@torch.no_grad()
def test_loss_of_one_window_is_the_one_that_transformers_gives(cli, byte_model):
    ids = torch.tensor([list(TEXT.encode()[:32])])
    Path("text.txt").write_bytes(TEXT.encode()[:32])
    found = results(cli("eval", "--init_from=model", "--text=text.txt", *FP32))["text.txt"]
    assert found["loss"] == pytest.approx(byte_model(ids, labels=ids).loss.item(), abs=1e-5)


def test_a_text_and_questions_are_read_by_their_byte_order_mark(cli, byte_model, hellaswag):
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        Path(f"{encoding}.txt").write_bytes(TEXT[:300].encode(encoding))
        Path(f"{encoding}.jsonl.gz").write_bytes(gzip.compress(hellaswag.read_text().encode(encoding)))
        assert inference.read(f"FILE:{encoding}.txt") == TEXT[:300]
        assert questions.load_questions("hellaswag", f"{encoding}.jsonl.gz") == [
            question._replace(where=question.where.replace(str(hellaswag), f"{encoding}.jsonl.gz"))
            for question in questions.load_questions("hellaswag", str(hellaswag))]
    found = [results(cli("eval", "--init_from=model", f"--text={name}.txt", *FP32))[f"{name}.txt"]
             for name in ("utf-8-sig", "utf-16", "utf-32")]
    assert found[0] == found[1] == found[2]
    assert found[0]["bytes"] == len(TEXT.encode()) - 1


@torch.no_grad()
def test_shorter_windows_and_a_sample_of_them(cli, byte_model):
    ids = list(TEXT.encode())
    base = ("eval", "--init_from=model", "--text=text.txt", *FP32)
    found = results(cli(*base, "--block_size=10", "--stride=4"))["text.txt"]
    assert found["loss"] == pytest.approx(naive_loss(byte_model, ids, 10, 4), abs=1e-4)
    found = results(cli(*base, "--block_size=10", "--eval_iters=2", "--batch_size=3"))["text.txt"]
    starts = [len(range(0, len(ids) - 1, 10)) * i // 6 * 10 for i in range(6)]
    wanted = [naive_loss(byte_model, ids[start:start + 11], 10, 10) for start in starts]
    assert found["tokens"] == 60
    assert found["loss"] == pytest.approx(np.mean(wanted), abs=1e-4)


def test_bits_per_byte_by_hand(cli, byte_model, tmp_path):
    """A model that finds all tokens alike spends log2 V bits on each; end-of-text stands for no bytes."""
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    torch.nn.init.zeros_(model.wte.weight)
    model.save_pretrained("uniform", eot_id=256)
    ByteTokenizer().save("uniform")
    Path("three.jsonl").write_text(json.dumps({"text": "dé"}) + "\n" + '{"text": "abc"}\n{"text": "äb"}\n')
    assert cli("prepare_data", "--input=three.jsonl", "--name=two", "--tokenizer=byte").code == 0  # and one validates
    Path("text.txt").write_text("äb")
    found = results(cli("eval", "--init_from=uniform", "--dataset=two", "--split=train", "--text=text.txt", *FP32))
    assert list(found) == ["text.txt", "two"]
    bits = math.log2(257)
    assert found["text.txt"] == pytest.approx({"loss": math.log(257), "perplexity": 257, "bits_per_byte": bits,
                                               "tokens": 2, "bytes": 2}, rel=1e-6)
    assert found["two"] == pytest.approx({"loss": math.log(257), "perplexity": 257, "bits_per_byte": bits * 7 / 6,
                                          "tokens": 7, "bytes": 6}, rel=1e-6)


def test_a_run_is_measured_on_its_own_data(cli, tiny_data):
    assert cli("train", *TINY_RUN).code == 0
    lines = cli("eval", "--out_dir=out/tiny", "--device=cpu", "--dtype=float32").out.splitlines()
    found = results(cli("eval", "--out_dir=out/tiny", *FP32))["tiny"]
    trained = json.loads(Path("out/tiny/metrics.jsonl").read_text().splitlines()[-1])
    assert found["loss"] == pytest.approx(trained["val/loss"], abs=1e-6)
    assert lines[0].startswith("out/tiny (step_00000006): 7,")
    assert lines[1] == (f"tiny: loss {found['loss']:.4f} nats per token, perplexity {found['perplexity']:.4f}, "
                        f"{found['bits_per_byte']:.4f} bits per byte ({found['tokens']:,} tokens, "
                        f"{found['bytes']:,} bytes)")
    assert found["tokens"] == found["bytes"]  # characters, all of them ASCII


def test_models_of_every_kind(cli, byte_model, tmp_path):
    """nanoGPT's ckpt.pt on nanoGPT's data, a Llama, a mix that only flatGPT reads, gpt2 from the hub's cache."""
    headerless(tmp_path / "data" / "tiny", meta=True)
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=17)
    assert results(cli("eval", "--init_from=ckpt.pt", *FP32))["tiny"]["tokens"] > 100
    rope = GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16, pos="rope")
    for config in (rope, GPTConfig(**vars(rope) | {"norm": "rmsnorm", "mlp": "swiglu"})):
        model = GPT(config).eval()
        model.save_pretrained("other")
        ByteTokenizer().save("other")
        ids = torch.tensor([list(TEXT.encode())])
        found = results(cli("eval", "--init_from=other", "--text=text.txt", f"--block_size={ids.size(1)}", *FP32))
        with torch.no_grad():
            wanted = model(ids[:, :-1], ids[:, 1:])[1].item()
        assert found["text.txt"]["loss"] == pytest.approx(wanted, abs=1e-5)


# Multiple choice

SAYING = ("the a cat dog man woman takes gives runs slowly quickly over under red blue ball house, river; then she he "
          "stops and laughs — naïve café 12 3rd don't Ελλάδα 日本語")
WORDS = SAYING.split()


def hellaswag_records() -> list[dict]:
    """50 questions in HellaSwag's own format, with all that its WikiHow half has in brackets."""
    draw = random.Random(5)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    records = []
    for i in range(50):
        ctx_a = words(3, 40) + draw.choice([".", "", "  . ", " [title] How to stop [step] ", " [substeps] now"])
        ctx_b = draw.choice(["", words(1, 3), "the McDonald "])
        endings = [words(1, 14) + draw.choice([".", " [step] go.", "  ", "", " Ελλάδα"]) for _ in range(4)]
        label = draw.randrange(4)
        records.append({"ind": i, "activity_label": words(1, 2), "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": "",
                        "endings": endings, "label": label, "split": "val", "source_id": f"x~{i}"})
    return records


@pytest.fixture
def hellaswag(tmp_path) -> Path:
    """questions.jsonl in tmp_path."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in hellaswag_records()))
    return path


@pytest.fixture
def bpe() -> Tokenizer:
    return train_bpe([SAYING * 3], 420)


def save_llama(folder: Path, tokenizer: Tokenizer) -> None:
    """A random Llama whose tokenizer begins every text with a token of its own, as Llama's does."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=56, num_hidden_layers=2, bos_token_id=0,
        eos_token_id=0, num_attention_heads=4, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    tokenizer.hf.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eot_id)])
    tokenizer.save(folder)
    assert tokenizer.opening() == [0]


LM_EVAL = """
import json
import sys
import lm_eval
from lm_eval.tasks import TaskManager

tasks = TaskManager(include_path=sys.argv[1], include_defaults=False)
for folder in sys.argv[2:]:
    found = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": folder, "dtype": "float32"}, tasks=["local_hellaswag"], device="cpu",
        batch_size=7, task_manager=tasks)
    samples = [[float(one[0]) for one in sample["filtered_resps"]] for sample in found["samples"]["local_hellaswag"]]
    print("FOUND" + json.dumps([found["results"]["local_hellaswag"], samples]))
"""
LM_EVAL_TASK = """
include: {their_folder}/tasks/hellaswag/hellaswag.yaml
task: local_hellaswag
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {questions}
training_split: null
"""


def lm_eval(questions: Path, folders: list[str], tmp_path: Path) -> list[tuple[dict[str, float], list[list[float]]]]:
    """For each model folder lm-eval's results, and the log-likelihood of each question's choices. In a process of its
    own, which alone has its cache in tmp_path."""
    their_folder = Path(importlib.util.find_spec("lm_eval").origin).parent
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(LM_EVAL_TASK.format(their_folder=their_folder, questions=questions))
    out = run_process("-c", LM_EVAL, "tasks", *folders, cwd=tmp_path, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
                      HF_DATASETS_CACHE=str(tmp_path / "cache"))
    return [json.loads(line.removeprefix("FOUND")) for line in out.splitlines() if line.startswith("FOUND")]


def test_hellaswag_is_lm_evals_to_the_last_digit(cli, hellaswag, bpe, tmp_path):
    """On a GPT-2 that transformers wrote, with questions that are too long for it; on a run of ours; on a Llama."""
    save_hf(tmp_path / "gpt2", vocab_size=bpe.vocab_size, n_positions=64, bos_token_id=0, eos_token_id=0)
    bpe.save(tmp_path / "gpt2")
    Path("words.txt").write_text(f"{SAYING} " * 100)
    assert cli("prepare_data", "--input=words.txt", "--name=tiny", "--tokenizer=bpe", "--vocab_size=420").code == 0
    assert cli("train", *TINY_RUN, "--block_size=64").code == 0
    save_llama(tmp_path / "llama", bpe)
    folders = ["gpt2", "out/tiny/checkpoints/best", "llama"]
    theirs = lm_eval(hellaswag, folders, tmp_path)
    assert len(theirs) == 3
    for folder, (found, samples) in zip(folders, theirs):
        base = ("eval", f"--init_from={folder}", "--tasks=hellaswag", f"--hellaswag_file={hellaswag}")
        ours = results(cli(*base, *FP32))["hellaswag"]
        assert ours["questions"] == 50
        for key in ("acc", "acc_norm"):
            assert ours[key] == found[f"{key},none"]
            assert ours[f"{key}_stderr"] == pytest.approx(found[f"{key}_stderr,none"], rel=1e-9)
        assert likelihoods(folder, hellaswag) == pytest.approx(np.array(samples).ravel(), abs=2e-3, rel=1e-5)


def likelihoods(folder: str, file: Path) -> list[float]:
    """As eval.py finds them, in the order of questions and choices."""
    job = Job(0, 1, torch.device("cpu"), torch.float32)
    model, tokenizer = GPT.from_pretrained(folder).eval(), inference.find_tokenizer(Path(folder), 0)
    rows = [row for question in questions.load_questions("hellaswag", str(file))
            for row in questions.encode_question(question, tokenizer, model.config.block_size)]
    return [found.log_prob for found in scoring.log_likelihoods(model, rows, 8, job)]


def captured(*args: str) -> str:
    """What the script prints, on one of several ranks."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        eval.main(list(args))
    return out.getvalue()


def test_two_ranks_find_what_one_finds(cli, byte_model, hellaswag, tmp_path):
    args = (f"--init_from={tmp_path}/model", f"--text={tmp_path}/text.txt", "--stride=20", "--tasks=hellaswag",
            "--batch_size=3", f"--hellaswag_file={hellaswag}", "--block_size=24", *FP32)
    lines = hellaswag.read_text().splitlines()[:5]
    short = [json.loads(line) | {"endings": ["a cat", "runs.", "over", "the river"]} for line in lines]
    hellaswag.write_text("".join(json.dumps(record) + "\n" for record in short))
    alone = results(cli("eval", *args))
    first, second = on_ranks(2, captured, *args)
    assert second == ""
    both = json.loads(first)["results"]
    assert both["hellaswag"] == alone["hellaswag"]
    assert both[f"{tmp_path}/text.txt"] == pytest.approx(alone[f"{tmp_path}/text.txt"], rel=1e-6)


def test_questions_from_the_hub_are_those_of_the_file(hellaswag, tmp_path, monkeypatch):
    """A folder laid out as Rowan/hellaswag is: Parquet, labels as text."""
    (tmp_path / "hub" / "data").mkdir(parents=True)
    rows = [record | {"label": str(record["label"])} for record in hellaswag_records()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hub" / "data" / "validation-00000.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(questions.TASKS, "hellaswag", questions.TASKS["hellaswag"]._replace(hub=str(tmp_path / "hub")))
    from_hub = questions.load_questions("hellaswag", "")
    from_file = questions.load_questions("hellaswag", str(hellaswag))
    assert [question[1:] for question in from_hub] == [question[1:] for question in from_file]


# Errors


@pytest.mark.parametrize(("options", "message"), [
    (["--text=empty.txt"], "cannot measure a loss on empty.txt"),
    (["--text=none.txt"], "none.txt"),
    (["--text=model/model.safetensors"], "model.safetensors is not UTF-8 text"),
    (["--text=pointer"], "pointer is a Git LFS pointer, not the file itself: `git lfs pull`"),
    (["--tasks=hellaswag", "--hellaswag_file=pointer"], "pointer is a Git LFS pointer"),
    (["--tasks=helaswag"], "there is no task 'helaswag'; did you mean 'hellaswag'?"),
    (["--hellaswag_file=x.jsonl"], "hellaswag_file=x.jsonl is for --tasks=hellaswag"),
    (["--tasks=hellaswag"], "could not get the data set Rowan/hellaswag"),
    (["--text=text.txt", "--stride=33"], "stride=33 would leave out tokens between windows of 32"),
    (["--text=text.txt", "--block_size=64"], "block_size=64: the model has only 32 positions"),
    (["--stride=-1", "--batch_size=0"],
     "stride=-1 must be 0 (block_size) or more; batch_size=0 must be 1 to 1,000,000"),
    ([], "does not say what data it was trained on: add --dataset=NAME"),
    (["--dataset=none"], "no data set 'none' in data/"),
])
def test_bad_input_is_one_line(refused, byte_model, options, message):
    Path("empty.txt").write_text("")
    Path("pointer").write_bytes(POINTER)
    assert message in refused("eval", "--init_from=model", *options)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "questions.jsonl:51 is not JSON"),
    ('{"activity_label": "\udcff"}', "questions.jsonl:51 holds 1 bytes that are not valid text"),
    ("[1]", "questions.jsonl:51 is not a question of hellaswag: TypeError"),
    ('{"activity_label": "x"}', "questions.jsonl:51 is not a question of hellaswag: it has no 'ctx_a'"),
    (json.dumps(hellaswag_records()[0] | {"label": 4}), ":51 is not a question of hellaswag: ValueError"),
    (json.dumps(hellaswag_records()[0] | {"label": ""}), ":51 is not a question of hellaswag: ValueError"),
    (json.dumps(hellaswag_records()[0] | {"endings": ["a", " "]}), "questions.jsonl:51 is not a question"),
    (json.dumps(hellaswag_records()[0] | {"endings": ["x" * 33] * 4}), "questions.jsonl:1: this answer has"),
])
def test_a_line_that_is_no_question_is_named(refused, byte_model, hellaswag, line, message):
    hellaswag.write_bytes(hellaswag.read_bytes() + f"{line}\n".encode(errors="surrogateescape"))
    assert message in refused("eval", "--init_from=model", "--tasks=hellaswag", f"--hellaswag_file={hellaswag}")


def test_a_file_without_questions(refused, byte_model):
    Path("none.jsonl").write_text("\n")
    base = ("eval", "--init_from=model", "--tasks=hellaswag")
    assert "none.jsonl holds no questions" in refused(*base, "--hellaswag_file=none.jsonl")


def test_data_of_another_tokenizer_is_refused(refused, byte_model, tiny_data):
    assert "made with another tokenizer than the model's" in refused(
        "eval", "--init_from=model", "--dataset=tiny")


def test_a_model_without_a_tokenizer(refused, tmp_path):
    save_hf(tmp_path / "bare")
    Path("text.txt").write_text("a text")
    assert "no tokenizer for the model's 101 tokens" in refused("eval", "--init_from=bare", "--text=text.txt")


def test_loss_needs_no_tokenizer_and_32_bit_ids_are_the_models(cli, refused, tmp_path):
    """Shards that say nothing of themselves, and a model beside which no tokenizer lies."""
    save_hf(tmp_path / "bare", vocab_size=300, bos_token_id=None, eos_token_id=None)
    (tmp_path / "data" / "plain").mkdir(parents=True)
    ids = np.random.default_rng(1).integers(300, size=100)
    for split in ("train", "val"):
        (tmp_path / f"data/plain/{split}_000000.bin").write_bytes(
            shard_header(len(ids), np.dtype(np.uint32)) + ids.astype(np.uint32).tobytes())
    found = results(cli("eval", "--init_from=bare", "--dataset=plain", *FP32))["plain"]
    assert (found["tokens"], found["bytes"], found["bits_per_byte"]) == (99, 0, None)
    assert found["loss"] == pytest.approx(naive_loss(
        transformers.GPT2LMHeadModel.from_pretrained("bare").eval(), ids.tolist(), 32, 32), abs=1e-4)
    assert " (99 tokens, 0 bytes)" in cli("eval", "--init_from=bare", "--dataset=plain", *FP32[:2]).out
    line = refused("eval", "--init_from=bare", "--dataset=plain", "--documents=mask")
    assert "where the documents of plain begin is not known" in line
    assert "--tokenizer=gpt2 of train.py" in line


def test_a_mixtures_loss_is_the_one_that_training_reports(cli, tiny_data):
    shutil.copytree("data/tiny", "data/more")
    Path("data/more/val_000000.bin").write_bytes(Path("data/tiny/train_000000.bin").read_bytes())
    Path("data/more/dataset.json").unlink()
    assert cli("train", *TINY_RUN, "--dataset=tiny:3,more:1", "--vocab_size=43").code == 0
    trained = json.loads(Path("out/tiny/metrics.jsonl").read_text().splitlines()[-1])
    found = results(cli("eval", "--out_dir=out/tiny", *FP32))
    assert found["mixture"]["loss"] == pytest.approx(trained["val/loss"], abs=1e-6)
    assert found["mixture"]["loss"] == pytest.approx(0.75 * found["tiny"]["loss"] + 0.25 * found["more"]["loss"])
    assert found["more"]["loss"] == pytest.approx(trained["val/loss/more"], abs=1e-6)

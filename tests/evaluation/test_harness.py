"""lm-evaluation-harness's tasks through eval.py, against the harness's own models."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_process
from live import serving
from served import make_app

from flatgpt.data.tokenizer import train_bpe
from flatgpt.serving.engine import Engine
from model import GPT, GPTConfig

SHAPES = {"gpt2": {}, "qwen3": {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qk_norm": True},
          "ours": {"pos": "alibi", "mlp": "relu2", "bias": False}}
HEAD = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\nfewshot_split: test\n"
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: choices\ndoc_to_target: label\n"
              "num_fewshot: 1\nmetric_list: [{metric: acc}, {metric: acc_norm}]\nmetadata: {version: 2.0}",
    "answer": "output_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{choices[label]}}'\n"
              "metric_list: [{metric: perplexity}, {metric: acc}]\nmetadata: {version: 1.0}",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{[text]*9}} <|endoftext|>'\n"
               "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]",
    "written": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{written}}'\n"
               "generation_kwargs: {until: [\",\", \"\\n\"], max_gen_toks: 12, do_sample: false, temperature: 0}\n"
               "metric_list: [{metric: exact_match}]"}
LM_EVAL = """
import sys
from lm_eval.__main__ import cli_evaluate

for words in sys.argv[1:]:  # its command line, several times in one process
    sys.argv = ["lm_eval", *words.split()]
    cli_evaluate()
"""


def save_models(tmp_path: Path) -> None:
    """Models of three shapes whose scores are not all alike, with one tokenizer."""
    words = "the quick brown fox jumps over lazy dogs, Line of a red house and the river; "
    tokenizer = train_bpe([words * 3], 300)
    for seed, (name, shape) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, **shape))
        with torch.no_grad():
            for p in model.parameters():
                p[:300].add_(torch.randn_like(p[:300]) * 0.1)
        model.save_pretrained(tmp_path / name, eot_id=tokenizer.eot_id)
        tokenizer.save(tmp_path / name)
    model, questions = GPT.from_pretrained(str(tmp_path / "gpt2")).eval(), []
    for i in range(20):
        text = f"Line {i}: the quick brown" + " lazy" * (i % 4)
        new = model.generate(torch.tensor([tokenizer.encode(text).tolist()]), 12, temperature=0)[0]
        written = tokenizer.decode(new[len(tokenizer.encode(text)):]).split(",")[0].split("\n")[0]
        questions.append({"text": text, "label": i % 3, "written": written if i % 2 else "something else",
                          "choices": [" fox", f" {i * i} jumps", " dogs" + " over the red house" * (i % 3)]})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Task files over tmp_path/questions.jsonl."""
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():
        (tmp_path / f"tasks/{name}.yaml").write_text(
            f"task: {name}\n{HEAD.format(file=tmp_path / 'questions.jsonl')}{task}\n")
    (tmp_path / "tasks/both.yaml").write_text(
        "group: both\ntask: [choice, answer]\naggregate_metric_list: [{metric: acc}]\n")
    return tmp_path / "tasks"


def test_scores_are_the_harnesss_for_models_of_three_shapes(cli, tasks, tmp_path, monkeypatch):
    """A GPT-2 and a Qwen3 as its model "hf" reads them, and a mix that only flatGPT reads through serve.py."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_models(tmp_path)
    kinds = [json.loads((tmp_path / name / "config.json").read_text())["model_type"] for name in SHAPES]
    assert kinds[:2] == ["gpt2", "qwen3"]
    assert kinds[2] not in ("gpt2", "qwen3", "llama")
    with serving(make_app(Engine(lambda: [], ["ours"], "cpu", "float32"))) as url:
        models = {name: f"--model=hf --model_args=pretrained={name},dtype=float32 --tasks=choice,answer,written,rolling"
                  for name in ("gpt2", "qwen3")}
        models["ours"] = (f"--model=local-completions --model_args=model=ours,base_url={url}/v1/completions,"
                          "max_length=65,tokenized_requests=True --tasks=choice,answer,written")
        run_process("-c", LM_EVAL, *(
            f"{model} --include_path=tasks --batch_size=7 --device=cpu --output_path=theirs/{name}/found.json"
            for name, model in models.items()), cwd=tmp_path, OMP_NUM_THREADS="1", DISABLE_MULTIPROC="1",
            HF_DATASETS_CACHE=str(tmp_path / "cache"))
    theirs = [json.loads(next((tmp_path / "theirs" / name).rglob("*.json")).read_text())["results"] for name in SHAPES]
    for name, found in zip(SHAPES, theirs):
        result = cli("eval", f"--init_from={name}", f"--tasks={','.join(found)}", "--include_path=tasks",
                     "--batch_size=3", "--device=cpu", "--dtype=float32", "--json")
        assert result.code == 0, result.err
        report = json.loads(result.out)
        for task, numbers in found.items():
            ours = report["results"][task]
            for key, number in numbers.items():
                if isinstance(number, float) and not math.isnan(number):
                    wanted = number if "acc" in key or "exact_match" in key else pytest.approx(number, rel=2e-5)
                    assert ours[key.removesuffix(",none")] == wanted, (name, task, key)
            assert ours["questions"] == 20
        assert report["tasks"]["choice"]["versions"] == {"choice": 2.0}
        assert report["tasks"]["answer"]["lower_is_better"] == ["perplexity"]
    assert 0.2 < theirs[0]["written"]["exact_match,none"] < 0.8
    assert any(0 < found["choice"]["acc,none"] < 1 for found in theirs)


def test_a_group_and_a_part_of_its_questions(cli, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_models(tmp_path)
    base = ("eval", "--init_from=gpt2", "--include_path=tasks", "--device=cpu", "--dtype=float32", "--limit=10")
    group = json.loads(cli(*base, "--tasks=both", "--json").out)["results"]
    assert group["choice"]["questions"] == group["answer"]["questions"] == 10
    assert group["both"]["acc"] == pytest.approx((group["choice"]["acc"] + group["answer"]["acc"]) / 2)
    assert "choice: acc " in cli(*base, "--tasks=choice").out


@pytest.mark.parametrize(("options", "message"), [
    (["--include_path=none"], "there is no folder none of task files"),
    (["--tasks=broken"], "the task broken could not be loaded: "),
    (["--tasks=long"], "the task wants 64 new tokens behind a text, but the model reads 64"),
    (["--tasks=answer", "--block_size=2"], "tokens, but the model reads 1 to 2"),
])
def test_bad_input_is_one_line(refused, tasks, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_models(tmp_path)
    (tasks / "broken.yaml").write_text(f"task: broken\n{HEAD.format(file='gone.jsonl')}{TASKS['choice']}\n")
    long = TASKS["written"].replace("max_gen_toks: 12", "max_gen_toks: 64")
    (tasks / "long.yaml").write_text(f"task: long\n{HEAD.format(file=tmp_path / 'questions.jsonl')}{long}\n")
    base = ("--tasks=choice", "--include_path=tasks", "--init_from=gpt2", "--device=cpu", "--dtype=float32")
    assert message in refused("eval", *base, *options)


def test_without_the_harness_its_tasks_are_refused_and_ours_is_not(refused, tasks, monkeypatch):
    monkeypatch.delattr("flatgpt.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "flatgpt.evaluation.harness", None)
    assert "arc_easy: tasks besides hellaswag are lm-evaluation-harness's, which cannot be imported here" in refused(
        "eval", "--tasks=hellaswag,arc_easy")

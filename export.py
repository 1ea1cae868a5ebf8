"""A clean Hugging Face folder of a run's checkpoint, or of the average of several, with a model card made from what the
runs recorded.

    python export.py --run=out/run --to=folder                              the best checkpoint
    python export.py --run=out/run --to=folder --checkpoint=step_5000       or latest, or any step that is kept
    python export.py --run=out/run --to=folder --average=5                  the mean of the last five checkpoints
    python export.py --run=out/run --to=folder --average=1000,2000 --average_weights=1,2       of two steps, weighted
    python export.py --run=out/a,out/b --to=folder                          the mean of two runs' best checkpoints
    python export.py --run=out/run --to=folder --push=owner/name            and upload it, private at first

The folder holds weights, configuration, tokenizer, README.md and the loss curve, and nothing that only a resume needs.
The folder appears only when it is complete. The card names files without their folders.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signals.begin()

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from flatgpt import files, run_folder
from flatgpt.data.loader import Mixture, open_mixture
from flatgpt.data.shards import Dataset
from flatgpt.data.sources import SOURCES
from flatgpt.data.tokenizer import load_tokenizer
from flatgpt.files import one_line
from flatgpt.models import averaging
from flatgpt.models.families import FAMILIES, family_of
from flatgpt.models.language_model import LanguageModel
from flatgpt.options import check_options, parse_options, run_script
from flatgpt.training.checkpoint import RunConfig
from flatgpt.training.metrics import LogConfig, summarize
from flatgpt.training.plots import PICTURES, RecordedRun, picture_of, render

PARTS = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
UNSHOWN = {"dataset", "init_from", "eval_only", "max_minutes", "backend", "timeout_s",  # options; the card has its own
           *(field.name for group in (RunConfig, LogConfig) for field in fields(group))}


@dataclass
class ExportConfig:
    run: Annotated[str, "paths"] = "out"  # run folder; with commas between them several, which are averaged
    to: Annotated[str, "path"] = ""  # folder to make; it must not exist
    checkpoint: str = "best"  # best, latest, or a step that is kept: step_5000
    average: str = ""  # so many last checkpoints, 5, or steps, 1000,2000; of each run, where there are several
    average_weights: str = ""  # 1,2,3: one for each checkpoint of the average, in their order; "" = all the same
    push: str = ""  # upload the folder to this repository on the Hugging Face hub: owner/name
    public: bool = False  # make that repository public; else it is private

    def validate(self) -> list[str]:
        """What is wrong with these options, a sentence each."""
        faults = []
        if not self.to:
            faults.append("--to=FOLDER says where the model folder is to be made")
        elif os.path.lexists(self.to):
            faults.append(f"{self.to} exists already: choose another --to, or remove it")
        if self.public and not self.push:
            faults.append("public=True is for --push=owner/name")
        if self.average_weights and not self.average and len(self.runs()) == 1:
            faults.append(f"average_weights={self.average_weights} is for --average, or several runs")
        if self.push and not files.HUB_ID.fullmatch(self.push):
            faults.append(f"push={self.push!r} is no name of a repository: owner/name")
        elif self.push:
            from huggingface_hub import get_token

            if not get_token():
                faults.append("pushing needs a token of the Hugging Face hub that may write: run `hf auth login`, or "
                              "set HF_TOKEN")
        return faults

    def conflicts(self, given: Collection[str]) -> list[str]:
        """Which of the given keys exclude each other."""
        return ["checkpoint and average both say which checkpoints are meant: leave one out"
                ] if self.average and "checkpoint" in given else []

    def runs(self) -> list[Path]:
        """The run folders; one that has commas in its name is one."""
        return [Path(self.run)] if Path(self.run).is_dir() else [Path(run.strip()) for run in self.run.split(",")]


@dataclass
class Part:
    """A checkpoint that the model is made of, alone or in an average."""

    run: Path
    folder: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.trainer = run_folder.read_trainer(self.folder)
        self.records = run_folder.read_records(self.run / "metrics.jsonl")
        self.options = self.trainer["options"]

    @property
    def name(self) -> str:
        """Of the run, without the folders above it."""
        return self.run.resolve().name

    def val_loss(self) -> float | None:
        """The validation loss that the run recorded at this step."""
        losses = [record["val/loss"] for record in self.records
                  if record["step"] == self.trainer["step"] and record.get("val/loss") is not None]
        return losses[-1] if losses else None


def main(argv: list[str]) -> None:
    """Make the model folder, and upload it if that was asked for."""
    config, given = parse_options(ExportConfig, argv, usage=__doc__)
    check_options(config, given)
    to, runs = Path(config.to), config.runs()
    chosen = [(run, folder) for run in runs for folder in (
        averaging.choose(run, config.average) if config.average
        else [run_folder.find_checkpoint(run, config.checkpoint)])]
    weights = averaging.read_weights(config.average_weights, len(chosen))
    with contextlib.ExitStack() as stack:
        for _, folder in chosen:
            stack.enter_context(run_folder.reading(folder))
            run_folder.verify(folder)
        if config.average or len(runs) > 1:
            averaging.check_fit([folder for _, folder in chosen])
        parts = [Part(run, folder, weight) for (run, folder), weight in zip(chosen, weights)]
        export(parts, to, config.push or to.name)
    steps = [f"step {part.trainer['step']:,} of {part.run}" for part in parts]
    made_of = f"the average of {', '.join(steps)}" if len(parts) > 1 else steps[0]
    print(f"made the model folder {to} from {made_of}; its README.md still needs a licence")
    if config.push:
        print(f"pushed to {push(to, config.push, config.public)}")


def export(parts: list[Part], to: Path, name: str) -> None:
    """Make `to` out of checkpoints that fit each other; `name` is what its card calls it. Raises ValueError, or OSError
    when the folder cannot be written."""
    *_, last = parts
    with files.new_folder(to) as hidden:
        for part in PARTS:
            if (last.folder / part).is_file():
                with files.named_errors(to / part):
                    shutil.copyfile(last.folder / part, hidden / part)
        if len(parts) > 1:
            averaging.write_average([part.folder for part in parts], [part.weight for part in parts],
                                    hidden / "model.safetensors")
        model = LanguageModel.from_pretrained(str(hidden))
        runs = {part.run.resolve(): part for part in parts}
        curve = picture_of(PICTURES[0], [
            RecordedRun(name if len(runs) == 1 else part.name, part.run, part.records, {}, None)
            for part in runs.values()])
        if curve:
            files.write_bytes(hidden / "loss.png", render(curve, "png"))
        files.write_text(hidden / "README.md", card(parts, name, model, curve is not None))


def push(folder: Path, repo_id: str, public: bool) -> str:
    """Upload a complete folder, and return its address. Raises OSError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=not public, exist_ok=True)
        is_exposed = not public and not api.repo_info(repo_id).private
        if not is_exposed:
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of flatGPT")
    except Exception as error:  # the hub's client, and what it stands on, have no error in common
        raise OSError(f"{folder} is complete, but could not be pushed to {repo_id}: {one_line(error)}; to try again: "
                      f"hf upload {repo_id} {folder} .{'' if public else ' --private'}") from None
    if is_exposed:
        raise OSError(f"{folder} is complete, but was not pushed: {repo_id} exists and is public. To upload there "
                      f"all the same: hf upload {repo_id} {folder} .")
    return str(address)


# The model card


def card(parts: list[Part], name: str, model: LanguageModel, has_curve: bool) -> str:
    """README.md, in Markdown, with the header that the hub reads."""
    c, folder = model.config, parts[-1].folder
    is_average, kind = len(parts) > 1, family_of(c)
    is_ours = files.read_json(folder / "config.json")["model_type"] == "flatgpt"
    data = {str(part.options["dataset"]): (part.options, open_data(part.options, part.trainer)) for part in parts}
    sets = [dataset for _, mixture in data.values() if mixture for dataset in mixture.datasets.values()]
    bases = list(dict.fromkeys(filter(None, (base_model(part.options) for part in parts))))
    # What made the model what it is: not where it was written or reported to, which is nobody's business.
    shown = {key: "; ".join(dict.fromkeys(str(part.options.get(key)) for part in parts))
             for key in parts[-1].options if key not in UNSHOWN}
    shape = FAMILIES[kind].title if kind else f"flatGPT's {c.model}"
    start = f"trained further from {' and '.join(bases)}" if bases else "trained from scratch"
    average = f" Its weights are the average of {len(parts)} checkpoints." if is_average else ""
    header = {"library_name": "" if is_ours else "transformers", "pipeline_tag": "text-generation",
              "base_model": bases[0] if len(bases) == 1 and files.HUB_ID.fullmatch(bases[0]) else "",
              "tags": ["flatgpt"], "datasets": list(dict.fromkeys(filter(None, map(hub_id, sets))))}
    sections = [
        f"# {name}", f"A language model in the shape of {shape}, {start} with flatGPT.{average}",
        table(shape_facts(model) | ({} if is_average else run_facts(parts[0]))),
        *([average_section(parts, name)] if is_average else []),
        f"## Loss\n\n{losses_section(parts, has_curve)}",
        "## Data\n\n" + "\n".join(data_section(*found) for found in data.values()),
        f"## Use\n\n{use_section(name, is_ours, folder, c.block_size)}",
        f"## Options\n\nflatGPT's, as the run{'s' if len(data) > 1 else ''} had them:\n\n{table(shown)}",
        "## Licence\n\nNot stated yet. Before you publish this model, state its licence here and as `license:` in the "
        "header. The licence of the training data may limit the choice."]
    return f"---\n{yaml(header)}---\n\n" + "\n\n".join(section.strip() for section in sections) + "\n"


def yaml(header: Mapping[str, Any]) -> str:
    """A YAML header of strings and lists of strings; empty values are left out."""
    return "".join(f"{key}: {value}\n" if isinstance(value, str) else
                   f"{key}:\n" + "".join(f"- {item}\n" for item in value) for key, value in header.items() if value)


def table(rows: Mapping[str, Any]) -> str:
    return "| | |\n| --- | --- |\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def base_model(options: Mapping[str, Any]) -> str:
    """What the run started from: a hub id, the name of a file or folder, or "" for a fresh model."""
    source = options["init_from"]
    return "" if source == "scratch" else source if files.HUB_ID.fullmatch(source) else Path(source).name


def shape_facts(model: LanguageModel) -> dict[str, str]:
    """Rows of the card's table: what the model is."""
    c = model.config
    return {"parameters": f"{model.num_params(non_embedding=False):,}",
            "layers, heads, channels": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
            "context": f"{c.block_size:,} tokens", "vocabulary": f"{c.vocab_size:,} tokens"}


def run_facts(part: Part) -> dict[str, str]:
    """Rows of the card's table: what its run came to."""
    trainer, came_to = part.trainer, summarize(part.records)
    branch = [f"step {record['step']:,} of `{Path(record['branched_from']).name}`"
              for record in part.records if "branched_from" in record]
    losses = {"validation loss": part.val_loss(), "best validation loss of the run": came_to.get("best_val_loss"),
              "final validation loss of the run": came_to.get("final_val_loss")}
    return {"step": f"{trainer['step']:,} of {part.options['max_iters']:,}",
            **({"branched from": branch[0]} if branch else {}), "tokens seen": f"{trainer['tokens']:,}",
            **{text: f"{loss:.4f}" for text, loss in losses.items() if loss is not None}}


def average_section(parts: list[Part], name: str) -> str:
    """What went into an average, and how its own loss, which nobody has measured yet, can be."""
    rows = "".join(f"| `{part.name}` | {part.trainer['step']:,} | {part.trainer['tokens']:,} | {part.weight:g} | "
                   f"{'–' if (loss := part.val_loss()) is None else format(loss, '.4f')} |\n" for part in parts)
    dataset = ",".join(Path(source).name for source in parts[-1].options["dataset"].split(","))
    return ("## Average\n\n| run | step | tokens seen | weight | its own validation loss |\n| --- | --- | --- | --- | "
            f"--- |\n{rows}\nEach tensor is the weighted mean of these checkpoints' own, summed in float64 and rounded "
            "once. The losses are those of the single checkpoints. The average has another one, which was not measured "
            f"when this card was made:\n\n```sh\npython eval.py --init_from={name} --dataset={dataset}\n```")


def losses_section(parts: list[Part], has_curve: bool) -> str:
    if not has_curve:
        return "No loss was recorded."
    what = "Cross-entropy in nats a token" + (", in training: not of the average." if len(parts) > 1 else ".")
    if any("val/sampled_loss" in record for part in parts for record in part.records):
        what += (" The last validation loss is that of the whole validation split; the earlier ones, from which "
                 "the best is chosen, are all measured on the same sample of it.")
    return f"![loss over tokens](loss.png)\n\n{what}"


def open_data(options: Mapping[str, Any], trainer: Mapping[str, Any]) -> Mixture | None:
    """The data sets that the run was trained on; None if they are missing or have changed."""
    try:
        data = open_mixture(options["dataset"], options["vocab_size"], options["tokenizer"])
    except (OSError, ValueError):
        return None
    return data if data.fingerprint == trainer["data_fingerprint"] else None


def hub_id(dataset: Dataset) -> str:
    """Of the data set on the hub that it was made from, or "": a folder has no commit."""
    made = dataset.manifest.get("arguments", {})
    source = made.get("source", "")
    return (SOURCES[source].hf if source in SOURCES else source) if made.get("commit") else ""


def data_section(options: Mapping[str, Any], data: Mixture | None) -> str:
    """What it was trained on, and where that came from; its name alone when the data are no longer here."""
    if data is None:
        names = ", ".join(Path(part).name for part in options["dataset"].split(","))
        return f"`{names}`; its origin was no longer known when this card was made."
    lines = []
    for (name, dataset), share in zip(data.datasets.items(), data.shares):
        made, source = dataset.manifest.get("arguments", {}), hub_id(dataset)
        origin = f"[{source}](https://huggingface.co/datasets/{source})" if source else ", ".join(
            Path(made[key]).name for key in ("source", "input") if made.get(key)) or "an unknown source"
        about = "".join(f", {key} {made[key]}" for key in ("subset", "commit") if made.get(key))
        tokens = ", ".join(f"{sum(map(int, split.lengths)):,} {key}" for key, split in dataset.splits.items())
        kind = f", tokenizer {dataset.tokenizer.kind}" if dataset.tokenizer else ""
        lines.append(f"- `{Path(name).name}`" + (f", {share:.1%} of the sequences" if len(data.shares) > 1 else "")
                     + f": made from {origin}{about}; tokens: {tokens}{kind}")
    return "\n".join(lines)


def use_section(name: str, is_ours: bool, folder: Path, block_size: int) -> str:
    """How to load it: with transformers, or a model of our own shape with flatGPT."""
    if is_ours:
        return ("transformers has no model of this shape; flatGPT has:\n\n"
                f"```sh\npython sample.py --init_from={name} --prompt=\"\"\n```\n\n"
                f"```python\nfrom model import GPT\n\nmodel = GPT.from_pretrained(\"{name}\")\n```")
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "",
             f"model = AutoModelForCausalLM.from_pretrained(\"{name}\")"]
    if (folder / "tokenizer.json").is_file():
        tokenizer, prompt = load_tokenizer(folder), "The "
        try:
            num_tokens = len(tokenizer.encode(prompt))
        except ValueError:  # it does not know these characters
            prompt, num_tokens = tokenizer.decode(tokenizer.encode_prompt("")), 1
        new = max(1, min(50, block_size - num_tokens))
        lines += [f"tokenizer = AutoTokenizer.from_pretrained(\"{name}\")",
                  f"inputs = tokenizer({json.dumps(prompt)}, return_tensors=\"pt\")",
                  f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={new}, do_sample=True)[0]))"]
    code = "\n".join(lines)
    return f"```python\n{code}\n```\n\nflatGPT reads it too: `python sample.py --init_from={name}`."


if __name__ == "__main__":
    run_script(main)

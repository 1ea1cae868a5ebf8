"""A clean Hugging Face folder of a run's checkpoint, with a model card made from what the run recorded.

    python export.py --run=out/run --to=folder                              the best checkpoint
    python export.py --run=out/run --to=folder --checkpoint=step_5000       or latest, or any step that is kept
    python export.py --run=out/run --to=folder --push=owner/name            and upload it, private at first

The folder holds weights, configuration, tokenizer, README.md and the loss curve, and nothing that only a resume needs.
The folder appears only when it is complete. The card names files without their folders.
"""

from __future__ import annotations

from flatgpt import signals

if __name__ == "__main__":  # before torch is imported, which takes seconds
    signals.begin()

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from flatgpt import files, run_folder
from flatgpt.data.loader import Mixture, open_mixture
from flatgpt.data.shards import Dataset
from flatgpt.data.sources import SOURCES
from flatgpt.data.tokenizer import load_tokenizer
from flatgpt.models import inference
from flatgpt.models.families import FAMILIES, family_of
from flatgpt.models.language_model import LanguageModel
from flatgpt.options import check_options, parse_options, run_script
from flatgpt.training.checkpoint import RunConfig
from flatgpt.training.device import one_line
from flatgpt.training.metrics import LogConfig, summarize
from flatgpt.training.plots import PICTURES, Run, picture_of, render

PARTS = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
UNSHOWN = {"dataset", "init_from", "eval_only", "max_minutes", "backend", "timeout_s",  # options; the card has its own
           *(field.name for group in (RunConfig, LogConfig) for field in fields(group))}


@dataclass
class ExportConfig:
    run: Annotated[str, "path"] = "out"  # run folder
    to: Annotated[str, "path"] = ""  # folder to make; it must not exist
    checkpoint: str = "best"  # best, latest, or a step that is kept: step_5000
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
        if self.push and not files.HUB_ID.fullmatch(self.push):
            faults.append(f"push={self.push!r} is no name of a repository: owner/name")
        elif self.push:
            from huggingface_hub import get_token

            if not get_token():
                faults.append("pushing needs a token of the Hugging Face hub that may write: run `hf auth login`, or "
                              "set HF_TOKEN")
        return faults


def main(argv: list[str]) -> None:
    config, _ = parse_options(ExportConfig, argv, usage=__doc__)
    check_options(config)
    run, to = Path(config.run), Path(config.to)
    folder = find_checkpoint(run, config.checkpoint)
    with run_folder.reading(folder):
        export(run, folder, to, config.push or to.name)
    print(f"made the model folder {to} from step {run_folder.step_of(folder):,} of {run}; its README.md still needs "
          "a licence")
    if config.push:
        print(f"pushed to {push(to, config.push, config.public)}")


def find_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint of a run called `which`. Raises ValueError, which lists the checkpoints that exist."""
    steps = run_folder.step_folders(run)
    if not steps:
        raise ValueError(f"{run} is not a run folder with checkpoints: --run takes the --out_dir of train.py")
    there = {"best": run_folder.best_checkpoint(run), "latest": run_folder.newest_checkpoint(run)} | {
        f"step_{step}": folder for step, folder in steps.items()}
    if folder := there.get(re.sub("^step_0+(?=[0-9])", "step_", which)):
        return folder
    raise ValueError(f"there is no checkpoint {which!r} in {run}; it has "
                     f"{', '.join(name for name, folder in there.items() if folder)}")


def export(run: Path, folder: Path, to: Path, name: str) -> None:
    """Make `to` out of a checkpoint; `name` is what its card calls it. Raises ValueError when the checkpoint is
    damaged, OSError when the folder cannot be written."""
    model = inference.load_model(str(folder))  # its checksums are verified there
    with files.new_folder(to) as hidden:
        for part in PARTS:
            if (folder / part).is_file():
                with files.named_errors(to / part):
                    shutil.copyfile(folder / part, hidden / part)
        records = run_folder.read_records(run / "metrics.jsonl")
        curve = picture_of(PICTURES[0], [Run(name, run, records, {}, None)])
        if curve:
            files.write_bytes(hidden / "loss.png", render(curve, "png"))
        files.write_text(hidden / "README.md", card(folder, name, model, records, curve is not None))


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


def card(folder: Path, name: str, model: LanguageModel, records: list[dict[str, Any]], has_curve: bool) -> str:
    """README.md, in Markdown, with the header that the hub reads."""
    trainer = run_folder.read_trainer(folder)
    options = trainer["options"]
    data = open_data(options, trainer)
    is_ours = files.read_json(folder / "config.json")["model_type"] == "flatgpt"
    base = base_model(options)
    # What made the model what it is: not where it was written or reported to, which is nobody's business.
    shown = {key: value for key, value in options.items() if key not in UNSHOWN}
    c = model.config
    kind = family_of(c)
    shape = FAMILIES[kind].title if kind else f"flatGPT's {c.model}"
    start = f"trained further from {base}" if base else "trained from scratch"
    header = {"library_name": "" if is_ours else "transformers", "pipeline_tag": "text-generation",
              "base_model": base if files.HUB_ID.fullmatch(base) else "", "tags": ["flatgpt"],
              "datasets": [source for source in map(hub_id, data.datasets.values()) if source] if data else []}
    sections = [
        f"# {name}", f"A language model in the shape of {shape}, {start} with flatGPT.",
        table(facts(model, trainer, records)),
        f"## Loss\n\n{losses_section(records, has_curve)}", f"## Data\n\n{data_section(options, data)}",
        f"## Use\n\n{use_section(name, is_ours, folder, c.block_size)}",
        f"## Options\n\nflatGPT's, as the run had them:\n\n{table(shown)}",
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


def facts(model: LanguageModel, trainer: Mapping[str, Any], records: list[dict[str, Any]]) -> dict[str, str]:
    """The card's table: what the model is, and what its run came to."""
    c, step, came_to = model.config, trainer["step"], summarize(records)
    job = [record["val/loss"] for record in records if record["step"] == step and record.get("val/loss") is not None]
    losses = {"validation loss": job[-1] if job else None,
              "best validation loss of the run": came_to.get("best_val_loss"),
              "final validation loss of the run": came_to.get("final_val_loss")}
    return {
        "parameters": f"{model.num_params(non_embedding=False):,}",
        "layers, heads, channels": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
        "context": f"{c.block_size:,} tokens",
        "vocabulary": f"{c.vocab_size:,} tokens",
        "step": f"{step:,} of {trainer['options']['max_iters']:,}",
        "tokens seen": f"{trainer['tokens']:,}",
    } | {text: f"{loss:.4f}" for text, loss in losses.items() if loss is not None}


def losses_section(records: list[dict[str, Any]], has_curve: bool) -> str:
    if not has_curve:
        return "No loss was recorded."
    what = "Cross-entropy in nats a token."
    if any("val/sampled_loss" in record for record in records):
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

"""The options of a run: those of train.py itself, and those of each module beside them. plan.py takes them as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from flatgpt.data.loader import DataConfig
from flatgpt.options import failed_rules
from flatgpt.training.checkpoint import RunConfig
from flatgpt.training.device import DeviceConfig
from flatgpt.training.distributed import ParallelConfig
from flatgpt.training.metrics import LogConfig
from flatgpt.training.optim import OptimConfig
from model import GPTConfig


@dataclass
class ModelConfig(GPTConfig):
    """Model; --init_from other than scratch loads its own shape"""

    vocab_size: int = 0  # vocabulary; 0 = the data set's own (50257 where it does not say)

    def validate(self) -> list[str]:
        return []  # TrainConfig, which knows whether they make a model by themselves, has them checked


# What only rank 0 acts on is marked {"rank": 0}: the ranks need not agree, rank 0's value counts for all.
@dataclass
class TrainConfig:
    init_from: Annotated[str, "path"] = "scratch"  # scratch, gpt2, hub id, model or run folder, ckpt.pt; resume: go on
    max_iters: int = 600000  # updates in the whole run
    eval_interval: int = 2000  # steps between evaluations on the validation split
    eval_iters: int = 200  # batches an evaluation, evenly spaced over the split; 0 = the whole split, as at the end
    eval_tokens: int = 0  # evaluate on the first so many tokens of the split in place of eval_iters, also at the end
    target_val_loss: float = 0.0  # the run is finished with the first evaluation at or below it; 0 = never
    eval_only: bool = False  # evaluate on the whole validation split and exit
    seed: int = 1337  # seed of the initial weights, the data order and dropout
    compile: Literal["auto", "True", "False"] = "auto"  # torch.compile the blocks; auto = on CUDA only
    attention: Literal["auto", "sdpa", "math", "flash3"] = "auto"  # kernel; auto = FlashAttention-3 where it runs
    activation_checkpointing: bool = False  # run the blocks again in the backward pass: less memory, more time
    bigram_counts: bool = False  # with model=bigram: count its best table instead of training, evaluate it and save it
    bigram_k: float = 1.0  # with bigram_counts: added to each count, so that no pair of tokens is impossible
    max_minutes: float = field(default=0.0, metadata={"rank": 0})  # minutes after the launch: save and stop; 0 = never
    run: RunConfig = field(default_factory=RunConfig, metadata={"rank": 0})
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig, metadata={"rank": 0})
    where: DeviceConfig = field(default_factory=DeviceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def validate(self) -> list[str]:
        """What is wrong with these options, a sentence each."""
        faults = failed_rules(
            self, ("seed", 0 <= self.seed < 2**63, "0 or more, below 2**63"),
            ("max_iters", self.max_iters >= 0, "0 or more"), ("eval_interval", self.eval_interval > 0, "positive"),
            ("eval_iters", self.eval_iters >= 0, "0 or more"), ("eval_tokens", self.eval_tokens >= 0, "0 or more"),
            ("target_val_loss", self.target_val_loss >= 0, "0 (none) or more"),
            ("bigram_k", self.bigram_k > 0, "positive"), ("max_minutes", self.max_minutes >= 0, "0 or more"))
        if self.log.profile and self.eval_only:
            faults.append(f"profile={self.log.profile} is for training, and this is eval_only=True")
        if self.bigram_counts and (self.model.model != "bigram" or self.init_from != "scratch"):
            faults.append(f"bigram_counts=True counts the table of --model=bigram --init_from=scratch, not of model="
                          f"{self.model.model}, init_from={self.init_from}")
        is_new = self.init_from not in ("scratch", "resume") and not self.run.branch_from
        if self.optim.width_base and (self.model.model != "gpt" or is_new):
            faults.append(f"width_base={self.optim.width_base} says how a new GPT begins, and this is model="
                          f"{self.model.model}, init_from={self.init_from}")
        elif self.optim.width_base and self.model.norm_position == "post" and self.model.tie_embeddings:
            faults.append(f"width_base={self.optim.width_base} needs a norm before the head, or a head of its own: "
                          "norm_position=pre, or tie_embeddings=False")
        if self.run.branch_from and (self.eval_only or self.init_from in ("scratch", "resume")):
            faults.append(f"branch_from={self.run.branch_from} trains on from a checkpoint of --init_from=RUN, the "
                          f"folder of a run; this is init_from={self.init_from}, eval_only={self.eval_only}")
        elif self.run.branch_from and Path(self.init_from).resolve() == Path(self.run.out_dir).resolve():
            faults.append(f"out_dir={self.run.out_dir} is the run that is to be branched: choose another --out_dir")
        if self.run.overwrite and self.init_from not in ("scratch", "resume") and Path(
                self.init_from).exists() and Path(self.init_from).resolve().is_relative_to(
                Path(self.run.out_dir).resolve()):
            faults.append(f"overwrite=True would delete init_from={self.init_from}: choose another --out_dir")
        if self.init_from == "scratch":
            faults += GPTConfig(**asdict(self.model) | {"vocab_size": self.model.vocab_size or 1}).validate()
        return faults

"""The run folder: what is published is whole, what is damaged is refused, what is foreign is left alone."""

import json
import os
import random
import shutil
import subprocess
import threading

import pytest
import torch
import transformers
from conftest import files_of
from torch._subclasses import FakeTensorMode

from flatgpt import files, launcher
from flatgpt.data.tokenizer import ByteTokenizer
from flatgpt.models import weights
from flatgpt.models.inference import load_model
from flatgpt.run_folder import best_checkpoint, newest_checkpoint, read_trainer, step_of, verify
from flatgpt.training import checkpoint
from flatgpt.training.checkpoint import MAX_FAILED_SAVES, RunConfig, RunFolder
from flatgpt.training.distributed import Job
from flatgpt.training.optim import OptimConfig, build_optimizer, optimizer_state
from flatgpt.training.resume import read_optimizer
from model import GPT, GPTConfig


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=8))
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
    optimizer.step()
    return model, optimizer, ByteTokenizer()


HERE = Job(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def said():
    return []


@pytest.fixture
def run(tmp_path, said):
    with RunFolder(RunConfig(out_dir=str(tmp_path / "run")), HERE, said.append) as folder:
        folder.open({"n_layer": 1}, is_new=True)
        yield folder


def save(run, parts, step, is_best=False):
    """Save and wait; the checkpoint's folder."""
    run.save(*parts, {"step": step}, is_best)
    run.finish()
    return run.steps()[-1]


def names(run):
    return sorted(p.name for p in run.checkpoints.iterdir())


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_is_a_hugging_face_folder_with_checksums(run, parts):
    folder = save(run, parts, 5, is_best=True)
    assert os.readlink(run.checkpoints / "latest") == os.readlink(run.checkpoints / "best") == "step_00000005"
    assert subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=False).returncode == 0
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == files_of(folder).keys() - {"SHA256SUMS"} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training/optimizer.safetensors", "training/trainer.json"}
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder)("hé")["input_ids"] == [104, 195, 169]
    assert all(torch.equal(a, b) for a, b in zip(load_model(str(folder)).parameters(), parts[0].parameters()))
    assert read_trainer(folder) == {"step": 5, "best_step": 5}
    assert {name.split(".")[0] for name in read_optimizer(folder)} == {"step", "exp_avg", "exp_avg_sq"}


def test_the_last_k_and_the_best_are_kept(run, parts):
    run.config.keep_last = 2
    for step in (1, 2, 3, 4, 5):
        save(run, parts, step, is_best=step == 2)
    assert names(run) == ["best", "latest", "step_00000002", "step_00000004", "step_00000005"]
    assert load_model(str(run.path)).config.n_layer == 1  # a run folder means its best checkpoint


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("link", [None, "step_00000003", "step_00000009", "/nowhere/step_00000003"])
def test_the_best_is_kept_whatever_the_link_says(run, parts, keep_last, link):
    run.config.keep_last = keep_last
    for step in range(1, 7):
        save(run, parts, step, is_best=step == 2)
        (run.checkpoints / "best").unlink(missing_ok=True)
        if link:
            (run.checkpoints / "best").symlink_to(link)
    assert [*map(step_of, run.steps())] == [2, *range(7 - keep_last, 7)]
    assert step_of(best_checkpoint(run.path)) == 2
    run.open({}, is_new=False)
    run.retire_after(run.steps()[1])
    save(run, parts, 7)
    assert step_of(run.steps()[0]) == 2
    assert os.readlink(run.checkpoints / "best") == "step_00000002"


@pytest.mark.parametrize("seed", range(4))
def test_the_best_is_the_one_that_was_saved_as_such_last_whatever_else_happened(run, parts, monkeypatch, seed):
    """Against a book kept by hand: improvements, saves that fail, going back, restarts, links that go."""
    rng = random.Random(seed)
    run.config.keep_last = rng.choice([0, 1, 2])
    step, loss, book = 0, 10.0, []  # book: (step, is_best), published, oldest first
    write_sums = checkpoint._write_sums
    for _ in range(14):
        step, is_best = step + 1, rng.random() < 0.4
        loss -= is_best
        fails = rng.random() < 0.25
        monkeypatch.setattr("flatgpt.training.checkpoint._write_sums", full_disk if fails else write_sums)
        run.save(*parts, {"step": step, "best_val_loss": loss}, is_best)
        run.poll()
        if not fails:
            book.append((step, is_best))
        if rng.random() < 0.2 and book:
            (run.checkpoints / "best").unlink(missing_ok=True)
            run.open({}, is_new=False)
        wanted = [at for at, was_best in book if was_best][-1:]
        if rng.random() < 0.2 and book:  # back to the best, or to one after it
            folder = rng.choice([folder for folder in run.steps() if step_of(folder) >= (wanted or [0])[0]])
            run.retire_after(folder)
            step, loss = step_of(folder), read_trainer(folder)["best_val_loss"]
            book = [(at, was_best) for at, was_best in book if at <= step]
        found = best_checkpoint(run.path)
        assert [step_of(found)] == wanted if wanted else found is None
        assert newest_checkpoint(run.path) == (run.steps()[-1] if book else None)


def full_disk(folder):
    raise OSError("No space left on device")


def test_a_best_that_could_not_be_saved_is_not_the_best(run, parts, monkeypatch):
    save(run, parts, 1, is_best=True)
    with monkeypatch.context() as broken:
        broken.setattr("flatgpt.training.checkpoint._write_sums", full_disk)
        run.save(*parts, {"step": 2, "best_val_loss": 1.0}, True)
        run.poll()
    run.config.keep_last = 1
    for step in (3, 4):
        save(run, parts, step)
    assert names(run) == ["best", "latest", "step_00000001", "step_00000004"]


def test_without_the_record_of_the_best_it_is_found_by_the_losses(run, parts):
    for step, loss in ((1, None), (2, 3.0), (3, 2.5), (4, 2.5), (5, 2.5)):
        folder = save(run, parts, step)
        files.write_json(folder / "training" / "trainer.json", {"step": step, "best_val_loss": loss})
    assert step_of(best_checkpoint(run.path)) == 3
    for unreadable in (b"", b"{", b"[]", b"\xff\xfe", None):
        path = run.steps()[-1] / "training" / "trainer.json"
        path.unlink(missing_ok=True) if unreadable is None else path.write_bytes(unreadable)
        assert step_of(best_checkpoint(run.path)) == 3
    assert best_checkpoint(run.path, before=2) is None


def test_a_checkpoint_in_a_links_place_becomes_its_steps_and_a_foreign_folder_moves_aside(run, parts):
    save(run, parts, 1, is_best=True), save(run, parts, 2)
    for name in ("best", "latest"):
        (run.checkpoints / name).unlink()
    (run.checkpoints / "step_00000001").rename(run.checkpoints / "best")
    (run.checkpoints / "latest").mkdir()
    (run.checkpoints / "latest" / "notes").write_text("somebody's")
    run.open({}, is_new=False)
    assert names(run) == ["latest.old", "step_00000001", "step_00000002"]
    save(run, parts, 3)
    assert names(run) == ["best", "latest", "latest.old", "step_00000001", "step_00000002", "step_00000003"]
    assert (run.checkpoints / "latest.old" / "notes").read_text() == "somebody's"
    verify(run.checkpoints / "best")


def test_what_is_in_the_way_of_a_link_or_a_deletion_costs_a_warning_and_no_save(run, parts, said, monkeypatch):
    run.config.keep_last = 1
    for step in (1, 2):
        save(run, parts, step)
    (run.checkpoints / "latest").unlink()
    (run.checkpoints / "latest" / "x").mkdir(parents=True)

    def refuse(*args):
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(run, "_retire", refuse)
    said.clear()
    for step in (3, 4, 5):
        save(run, parts, step)
    assert [line for line in said if line.startswith("warning")] == [
        f"warning: the links best and latest could not be made in {run.checkpoints} (Is a directory); going on "
        "without them: flatGPT's scripts find the best and the newest checkpoint by themselves",
        f"warning: {run.checkpoints / 'step_00000002'} could not be deleted: Permission denied; going on"]


@pytest.mark.parametrize("victim", ["model.safetensors", "config.json", "training/trainer.json", "tokenizer.json",
                                    "SHA256SUMS"])
def test_a_flipped_byte_is_found_and_an_older_checkpoint_taken(run, parts, said, victim):
    older, newer = save(run, parts, 1), save(run, parts, 2)
    flip_byte(newer / victim)
    said.clear()
    with pytest.raises(ValueError, match="damaged"):
        load_model(str(newer))
    assert run.newest_valid() == older
    assert str(newer) in said[0]
    assert "going back to step_00000001" in said[0]
    flip_byte(older / victim)
    with pytest.raises(ValueError, match="no other checkpoint is left"):
        run.newest_valid()


def test_missing_files_and_missing_sums_are_damage(run, parts):
    folder = save(run, parts, 1)
    (folder / "training" / "trainer.json").unlink()
    with pytest.raises(ValueError, match=r"trainer\.json is missing"):
        verify(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="no SHA256SUMS"):
        verify(folder)


def test_every_nth_step_is_kept_as_well(run, parts):
    run.config.keep_last, run.config.keep_every = 1, 4
    for step in (2, 4, 6, 8, 9, 10):
        save(run, parts, step, is_best=step == 6)
    assert names(run) == ["best", "latest", "step_00000004", "step_00000006", "step_00000008", "step_00000010"]


def test_a_save_goes_on_beside_training_and_holds_the_state_it_began_with(run, parts, said, monkeypatch):
    model, optimizer, _ = parts
    began, may_write = threading.Event(), threading.Event()
    write = weights.save_pretrained

    def slow_write(*args, **options):
        began.set()
        assert may_write.wait(60)
        write(*args, **options)

    monkeypatch.setattr("flatgpt.models.weights.save_pretrained", slow_write)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    means = {name: t.clone() for name, t in optimizer_state(optimizer, model).items()}
    run.save(*parts, {"step": 1}, True)
    assert began.wait(60)
    run.poll(wait=False)
    assert said == []  # under way
    optimizer.step()
    may_write.set()
    run.poll()
    assert said == [f"step 1: saved {run.steps()[0]} (best so far)"]
    for name, p in load_model(str(run.path)).named_parameters():
        assert torch.equal(p, before[name])
    saved = read_optimizer(run.steps()[0])
    assert saved.keys() == means.keys()
    assert all(torch.equal(saved[name], means[name]) for name in means)


def test_the_copy_on_the_host_is_one_piece_of_pinned_memory_for_a_gpu(monkeypatch):
    """Torch rounds each piece up to a power of two."""
    asked, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **how: asked.append((*shape, pin_memory))
                        or empty(*shape, **how))
    with FakeTensorMode():
        on_gpu = {"a": empty(3, 5, device="cuda"), "b": empty((), device="cuda", dtype=torch.float64),
                  "c": empty(0, 4, device="cuda"), "d": empty(7, device="cuda", dtype=torch.bfloat16)}
    buffers = checkpoint._host_buffers(on_gpu)
    assert asked == [(3 * checkpoint.ALIGNMENT, True)]
    assert {t.untyped_storage().data_ptr() for t in buffers.values()} == {buffers["a"].data_ptr()}
    assert {name: (t.shape, t.dtype) for name, t in buffers.items()} == {
        name: (t.shape, t.dtype) for name, t in on_gpu.items()}


def test_the_copy_on_the_host_is_used_again_until_there_is_other_state_to_copy():
    host: dict[str, torch.Tensor] = {}
    for live in ({"a": torch.randn(3, 5), "step": torch.tensor(2.0)}, {"a": torch.randn(3, 5)}, {}):
        for _ in range(2):
            checkpoint._copy_to_host(live, host, HERE)
            assert host.keys() == live.keys()
            assert all(torch.equal(host[name], live[name]) for name in live)
            assert len({t.untyped_storage().data_ptr() for t in host.values()}) <= 1
        kept = [t.data_ptr() for t in host.values()]
        checkpoint._copy_to_host(live, host, HERE)
        assert [t.data_ptr() for t in host.values()] == kept


def test_a_save_that_fails_leaves_what_was_there_and_the_third_in_a_row_ends_the_run(run, parts, said, monkeypatch):
    save(run, parts, 1)
    before = files_of(run.path)

    def no_space(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("flatgpt.models.weights.save_tensors", no_space)
        for step in range(2, 2 + MAX_FAILED_SAVES):
            assert not run.gave_up
            run.save(*parts, {"step": step}, False)
            run.poll()
            assert said[-1].startswith(f"warning: step {step} could not be saved: No space left on device")
        assert run.gave_up
        with pytest.raises(OSError, match="saving failed 3 times in a row: No space left"):
            run.finish()
        assert files_of(run.path) == before
        assert names(run) == ["latest", "step_00000001"]
    save(run, parts, 5)  # a save that works wipes the slate
    assert not run.gave_up


def test_a_defect_in_a_save_is_not_taken_for_a_full_disk(run, parts, monkeypatch):
    monkeypatch.setattr("flatgpt.models.weights.save_tensors", lambda *args: 1 / 0)
    run.save(*parts, {"step": 1}, False)
    with pytest.raises(ZeroDivisionError):
        run.poll()


def test_a_full_disk_is_an_oserror(run, parts):
    resource = pytest.importorskip("resource")
    save(run, parts, 1)
    before, limits = files_of(run.path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write"):
            save(run, parts, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(run.path) == before


def test_what_a_killed_save_left_is_cleaned_up_and_never_taken_for_a_checkpoint(run, parts):
    save(run, parts, 1)
    (run.checkpoints / ".step_00000002" / "training").mkdir(parents=True)
    assert run.newest_valid().name == "step_00000001"
    run.open({}, is_new=False)
    assert names(run) == ["latest", "step_00000001"]


def test_a_damaged_folder_is_replaced_when_its_step_comes_round_again(run, parts):
    folder = save(run, parts, 1)
    flip_byte(folder / "model.safetensors")
    verify(save(run, parts, 1))


def test_two_runs_cannot_share_a_folder(run):
    with RunFolder(run.config, HERE) as second:
        for take in (lambda: second.find(lock=True), lambda: second.open({}, is_new=False)):
            with pytest.raises(OSError, match="in use by another run"):
                take()


def test_resume_policies(run, parts, tmp_path):
    def find(**options):
        run.config = RunConfig(str(run.path), **options)
        return run.find(lock=True)

    assert find() is None
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find(resume="must")
    folder = save(run, parts, 1)
    assert find() == find(resume="must") == folder
    with pytest.raises(ValueError, match="--overwrite=True"):
        find(resume="never")
    assert find(resume="never", overwrite=True) is None
    assert folder.exists()  # nothing is deleted before the new run begins
    run.open({"n_layer": 2}, is_new=True)
    assert names(run) == []
    assert json.loads((run.path / "train_config.json").read_text()) == {"n_layer": 2}


JOB = {"SLURM_CLUSTER_NAME": "one", "SLURM_JOB_ID": "77"}
TASK = JOB | {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
REQUEUED = {"SLURM_RESTART_COUNT": "1"}


@pytest.mark.parametrize(("began", "now", "goes_on"), [
    (JOB, JOB | REQUEUED, True),
    (TASK, TASK | REQUEUED, True),
    (JOB | REQUEUED, JOB | {"SLURM_RESTART_COUNT": "2"}, True),
    (JOB | {"SLURM_RESTART_COUNT": ""}, JOB | REQUEUED, True),
    ({}, REQUEUED, False),
    ({}, JOB | REQUEUED, False),
    (REQUEUED, REQUEUED | {"SLURM_RESTART_COUNT": "2", "SLURM_JOB_ID": ""}, False),
    (JOB, JOB, False),  # a second run of the same job
    (JOB | REQUEUED, JOB | REQUEUED, False),
    (JOB, JOB | {"SLURM_RESTART_COUNT": "0"}, False),
    (JOB, JOB | {"SLURM_RESTART_COUNT": ""}, False),
    (JOB, JOB | REQUEUED | {"SLURM_JOB_ID": "78"}, False),
    (JOB, JOB | REQUEUED | {"SLURM_CLUSTER_NAME": "two"}, False),
    (TASK, TASK | REQUEUED | {"SLURM_ARRAY_TASK_ID": "4"}, False),
], ids=repr)
def test_never_goes_on_with_what_this_slurm_job_began_before_it_was_requeued(run, parts, monkeypatch, began, now,
                                                                              goes_on):
    def start(env, **options):
        for key in {**TASK, **REQUEUED}:
            monkeypatch.delenv(key, raising=False)
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        return RunFolder(RunConfig(str(run.path), **options), HERE)

    run._lock.release(force=True)
    with start(began) as first:
        first.open({}, is_new=True)
        folder = save(first, parts, 1)
    with start(now, resume="never", overwrite=True) as second:
        assert second.find(lock=True) == (folder if goes_on else None)
        second.open({}, is_new=not goes_on)
        assert second.steps() == ([folder] if goes_on else [])


@pytest.mark.parametrize("record", [None, "", "{", "[]", '{"ranks": []}'])
def test_a_run_without_a_record_of_its_launch_is_of_none(run, parts, monkeypatch, record):
    save(run, parts, 1)
    path = run.path / "launch.json"
    path.unlink() if record is None else path.write_text(record)
    for key, value in {**JOB, **REQUEUED}.items():
        monkeypatch.setenv(key, value)
    run.config = RunConfig(str(run.path), resume="never", overwrite=True)
    assert run.find(lock=True) is None
    assert run.open({}, is_new=True)
    assert names(run) == []


def test_never_goes_on_with_what_any_of_torchruns_ranks_has_begun(run, parts, monkeypatch):
    """Also when rank 0 is on another node now."""
    launches = [{"torchrun": name, "slurm_job": "", "slurm_restarts": "0"} for name in ("", "one", "two", "three")]
    run._launch = launches[1:3]
    run.open({}, is_new=True)
    folder = save(run, parts, 1)
    run.config = RunConfig(str(run.path), resume="never", overwrite=True)
    for ranks, goes_on in (([1, 2], True), ([2, 3], True), ([3, 1], True), ([3], False), ([0], False)):
        run._launch = [launches[rank] for rank in ranks]
        assert run.find(lock=True) == (folder if goes_on else None)
    assert not launcher.is_restart(launches[0], launches[0])


def test_a_run_that_began_between_the_look_and_the_start_is_not_written_over(run, parts):
    save(run, parts, 1)
    before = files_of(run.path)
    with pytest.raises(OSError, match="another run has begun"):
        run.open({"n_layer": 2}, is_new=True)
    assert files_of(run.path) == before


@pytest.mark.parametrize("act", ["prune", "replace"])
def test_a_deletion_that_is_killed_leaves_no_half_checkpoint(run, parts, monkeypatch, act):
    save(run, parts, 1)
    removed = []

    def die_half_way(path, *args, **kwargs):
        removed.append(path)
        os.unlink(os.path.join(path, "config.json"))
        raise KeyboardInterrupt

    monkeypatch.setattr("flatgpt.training.checkpoint.shutil.rmtree", die_half_way)
    run.config.keep_last = 1
    with pytest.raises(KeyboardInterrupt):
        save(run, parts, 2 if act == "prune" else 1)
    assert len(removed) == 1
    for folder in run.steps():
        verify(folder)


def test_copies_beside_the_checkpoints_are_none_of_ours(run, parts):
    folder = save(run, parts, 20)
    shutil.copytree(folder, run.checkpoints / "step_00000030.bak")
    (run.checkpoints / "step_00000040").write_text("a file")
    (run.checkpoints / "step_00000050").symlink_to("nowhere")
    assert run.steps() == [folder]
    assert run.newest_valid() == newest_checkpoint(run.path) == folder
    for step in (40, 50):  # and they are in nobody's way
        assert save(run, parts, step) == run.steps()[-1]
    (run.checkpoints / ".nfs0001").write_text("the system's")
    run.open({}, is_new=False)
    assert ".nfs0001" in names(run)


def test_looking_for_a_run_makes_nothing(tmp_path):
    with RunFolder(RunConfig(str(tmp_path / "absent")), HERE) as run:
        assert run.find(lock=True) is None
    assert not (tmp_path / "absent").exists()

"""ProtoCLIPTrainer on two processes: no process takes a branch to a collective alone."""

import functools
import os
import shutil
import warnings

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import torch
import torch.distributed as dist
from hf_trainer import HEADS, Recorded, trainer, weights
from host_pairs import PicturePairs
from host_transformers import small_model
from rank_cases import rank_case
from ranks import assert_same_on_every_rank, everyone, raises_everywhere

from protoclip_losses import Clustering, EpisodicClusterer, OnlinePrototypes, ProtoLoss, TeacherAdapter
from protoclip_losses.integrations.transformers import add_heads

ROWS = 21


pairs = functools.cache(lambda: PicturePairs(ROWS))
on_two_processes = rank_case(world_sizes=(2,), own_processes=True)


def begun(folder, epochs=2, **options):
    """A Trainer whose epochs are two steps. 21 samples, of which one process has 11."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)  # as torchrun does
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", ACCELERATE_USE_CPU="1")
    torch.manual_seed(0)
    arguments = {"per_device_train_batch_size": 6, "num_train_epochs": epochs, "save_steps": 3, "ddp_backend": "gloo"}
    return trainer(folder, pairs(), arguments=arguments, **options)


def copies(folder, rank, step):
    """A checkpoint as a machine has it that shares no disk with the others."""
    own = folder.with_name(f"{folder.name}.{rank}") / f"checkpoint-{step}"
    shutil.copytree(folder / f"checkpoint-{step}", own)
    return own


def online_loss():
    loss = ProtoLoss()
    loss.set_prototypes(OnlinePrototypes(4, queue_size=20, every=2, warmup=2))
    return loss


def parameters(run):
    return torch.cat([p.detach().reshape(-1) for p in run.model.parameters()])


@on_two_processes
def episodes_and_their_number_of_prototypes_are_those_of_all_ranks(rank, world_size, folder):
    folder = folder / "episodes_and_their_number_of_prototypes_are_those_of_all_ranks"
    run = begun(folder, loss=Recorded(), num_prototypes=None)
    run.train()
    assert run.clusterer.num_prototypes == 2
    assert run.loss.prototypes.index.tolist() == list(range(ROWS))
    samples = everyone(torch.tensor(run.loss.samples)).T.reshape(2, -1)
    assert all(set(epoch.tolist()) == set(range(ROWS)) for epoch in samples)
    assert_same_on_every_rank(parameters(run))


@on_two_processes
def the_file_of_one_rank_is_missing(rank, world_size, folder):
    """In online mode every rank starts anew, and the first one says so."""
    folder = folder / "the_file_of_one_rank_is_missing"
    begun(folder, loss=online_loss()).train()
    dist.barrier()
    if rank == 1:
        (folder / "checkpoint-3" / "proto_loss_1_of_2.pt").unlink()
    dist.barrier()
    run = begun(folder, loss=online_loss())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    said = [str(w.message) for w in seen if "each begins with an empty queue" in str(w.message)]
    assert [("proto_loss_0_of_2.pt on process(es) [1] of 2" in text) for text in said] == [True] * (rank == 0)
    assert run.loss.prototypes.step == 1
    assert_same_on_every_rank(parameters(run))


@on_two_processes
def the_file_of_one_rank_is_damaged(rank, world_size, folder):
    folder = folder / "the_file_of_one_rank_is_damaged"
    begun(folder, loss=online_loss()).train()
    dist.barrier()
    if rank == 0:
        (folder / "checkpoint-3" / "proto_loss_1_of_2.pt").write_bytes(b"PK")
    dist.barrier()
    resumed = begun(folder, loss=online_loss())
    raises_everywhere(lambda: resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3")), 1, Exception, "")


@on_two_processes
def one_machine_has_no_prototypes(rank, world_size, folder):
    """Step 3 of 4 is in the middle of an epoch: the one has its prototypes and the other would cluster alone."""
    folder = folder / "one_machine_has_no_prototypes"
    whole = begun(folder)
    whole.train()
    dist.barrier()
    own = copies(folder, rank, 3)
    if rank == 1:
        (own / "proto_loss.pt").unlink()
    run = begun(folder, loss=Recorded())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.train(resume_from_checkpoint=str(own))
    assert any("prototypes are built anew" in str(w.message) for w in seen) == (rank == 0)
    assert not run.is_restored
    assert all(parts["proto_loss"] > 0.3 for _, parts in run.loss.calls)
    assert_same_on_every_rank(parameters(run))


@on_two_processes
def one_machine_has_prototypes_of_another_episode(rank, world_size, folder):
    folder = folder / "one_machine_has_prototypes_of_another_episode"
    begun(folder, 3, episode_size=16).train()
    dist.barrier()
    own = copies(folder, rank, 3)
    if rank == 1:
        shutil.copy(folder / "checkpoint-6" / "proto_loss.pt", own / "proto_loss.pt")
    run = begun(folder, 3, episode_size=16, loss=Recorded())
    run.train(resume_from_checkpoint=str(own))
    assert all(parts["proto_loss"] > 0.3 for _, parts in run.loss.calls)
    assert_same_on_every_rank(parameters(run))


@on_two_processes
def one_machine_has_no_model(rank, world_size, folder):
    folder = folder / "one_machine_has_no_model"
    begun(folder).train()
    dist.barrier()
    own = copies(folder, rank, 3)
    if rank == 1:
        (own / "model.safetensors").unlink()
    raises_everywhere(lambda: begun(folder).train(resume_from_checkpoint=str(own)), 1, ValueError, "find a valid checkpoint")


@on_two_processes
def a_sample_that_fails_in_extraction_on_one_rank(rank, world_size, folder):
    folder = folder / "a_sample_that_fails_in_extraction_on_one_rank"
    items = [pairs()[i] for i in range(ROWS)]

    def collate(batch):
        if rank == 1:
            raise KeyError("broken")
        return torch.utils.data.default_collate(batch)

    run = begun(folder, warmup_epochs=0, data_collator=collate)
    run.train_dataset.dataset = items
    raises_everywhere(run.train, 1, KeyError, "broken")


@on_two_processes
def what_two_processes_save_opens_on_one(rank, world_size, folder):
    folder = folder / "what_two_processes_save_opens_on_one"
    run = begun(folder)
    run.train()
    run.save_model(str(folder / "end"))
    dist.barrier()
    saved, own = weights(folder / "end"), add_heads(small_model(), **HEADS)
    own.load_state_dict(saved, strict=True)
    assert all(torch.equal(x, saved[name]) for name, x in run.model.state_dict().items())


@on_two_processes
def words_that_were_clustered_once_are_those_of_all_ranks(rank, world_size, folder):
    """Made and clustered after TrainingArguments, by both processes together; and resumed."""
    pytest.importorskip("sklearn")
    folder = folder / "words_that_were_clustered_once_are_those_of_all_ranks"
    options = {"loss": Recorded(w_proto=0.0), "epochs": 3}
    begun(folder, **options)  # joins the processes
    alone = EpisodicClusterer(4, process_group=False).fit_teacher(
        TeacherAdapter.from_captions(pairs().captions, 8, process_group=False)
    )
    clusters = EpisodicClusterer(4).fit_teacher(TeacherAdapter.from_captions(pairs().captions, 8))
    assert torch.equal(clusters.labels, alone.labels)
    whole = begun(folder, teachers={"words": clusters}, **options)
    whole.train()
    labels = whole.loss.prototypes.labels_by_teacher["words"]
    assert torch.equal(labels, clusters.labels)
    assert min(parts["proto_external_loss"] for _, parts in whole.loss.calls[-2:]) > 0.3
    assert_same_on_every_rank(parameters(whole))
    dist.barrier()
    rest = begun(folder, teachers={"words": clusters}, **{**options, "loss": Recorded(w_proto=0.0)})
    rest.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert len(rest.loss.calls) == 3
    assert torch.equal(parameters(rest), parameters(whole))


@on_two_processes
def clusterings_that_differ_are_an_error_on_both(rank, world_size, folder):
    folder = folder / "clusterings_that_differ_are_an_error_on_both"
    labels = torch.arange(ROWS).remainder(4 - rank)
    run = begun(folder, teachers={"words": Clustering(torch.eye(4), labels)}, warmup_epochs=0)
    with pytest.raises(ValueError, match="ranks must agree on teachers"):
        run.train()
    few = Clustering(torch.eye(4), labels[: ROWS - rank])
    raises_everywhere(lambda: begun(folder, teachers={"words": few}), 1, ValueError, "a row for each of the 21 samples")

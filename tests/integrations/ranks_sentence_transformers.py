"""ProtoCLIPLoss and ProtoCLIPCallback on two processes: heads that no DDP wraps stay equal, and no process collects alone."""

import copy
import os

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
import torch
import torch.distributed as dist
from cases import assert_near
from rank_cases import rank_case
from ranks import assert_same_on_every_rank, raises_everywhere
from st_trainer import ROWS, Recorded, model, online, pairs, trainer, weights
from transformers import TrainerCallback

from protoclip_losses import OnlinePrototypes, ProtoLoss

on_two_processes = rank_case(world_sizes=(2,), own_processes=True)


def begun(folder, epochs=2, batch=7, **options):
    """A Trainer whose epochs are three steps of 7 rows on each process."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)  # as torchrun does
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", ACCELERATE_USE_CPU="1")
    arguments = {"per_device_train_batch_size": batch, "num_train_epochs": epochs, "ddp_backend": "gloo"}
    arguments |= {"save_strategy": "steps", "save_steps": 4, **options.pop("arguments", {})}
    return trainer(folder, arguments=arguments, own=model(folder.parent / "start"), **options)


def flat(run):
    return torch.cat([x.reshape(-1).float() for x in weights(run).values()])


class Seen(TrainerCallback):
    """Keeps the inputs of the first step with prototypes, the weights before it and the gradients after it."""

    def __init__(self, loss):
        self.loss, self.step, self.inputs = loss, None, None
        forward = loss.forward

        def watched(columns, labels=None):
            if self.inputs is None and loss.loss.prototypes is not None:
                self.inputs = [dict(column) for column in columns], labels
                model = getattr(loss.model, "module", loss.model)
                self.before = copy.deepcopy(model), copy.deepcopy(loss.heads)
            return forward(columns, labels)

        loss.forward = watched

    def on_pre_optimizer_step(self, args, state, control, model, **others):
        if self.step is None and self.inputs is not None:
            self.step = state.global_step
            parameters = {**dict(model.named_parameters()), **dict(self.loss.heads.named_parameters())}
            self.gradients = {name: p.grad.clone() for name, p in parameters.items()}


def grads(parameters):
    return {name: p.grad for name, p in parameters.items()}


def of_all(x):
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@on_two_processes
def gradients_are_those_of_one_process_on_the_whole_batch(rank, world_size, folder):
    """Of the model and of the heads, in a step with prototypes; and heads that began apart are the first process's."""
    run = begun(folder / "gradients", arguments={"max_grad_norm": 0.0, "save_strategy": "no"})
    with torch.no_grad():
        for p in run.loss.heads.parameters():
            p.add_(0.1 * rank)
    seen = Seen(run.loss)
    run.add_callback(seen)
    run.train()
    assert seen.step == 3
    assert_same_on_every_rank(flat(run))
    columns, labels = seen.inputs
    encoder, heads = seen.before
    z = [
        encoder({k: of_all(x) if isinstance(x, torch.Tensor) else x for k, x in column.items()})["sentence_embedding"]
        for column in columns
    ]
    scale = encoder[0].model.logit_scale.exp()
    alone = ProtoLoss(process_group=False)
    # The prototypes of the first of the two epochs that have any are still those of the loss.
    alone.set_prototypes(run.loss.loss.prototypes)
    normalized = [torch.nn.functional.normalize(x, dim=1) for x in z]
    alone(*normalized, scale, **heads(*z), index=of_all(labels)).backward()
    wanted = {**dict(encoder.named_parameters()), **dict(heads.named_parameters())}
    assert wanted.keys() == seen.gradients.keys()
    of_heads = [name for name, _ in heads.named_parameters()]
    for names in (of_heads, [name for name in wanted if name not in of_heads]):
        assert_near(*(torch.cat([g[name].reshape(-1) for name in names]) for g in (seen.gradients, grads(wanted))), 1e-5)


@on_two_processes
def a_run_with_episodes_is_resumed_in_the_middle_of_one(rank, world_size, folder):
    folder = folder / "a_run_with_episodes_is_resumed_in_the_middle_of_one"
    whole = begun(folder)
    whole.train()
    assert whole.loss.loss.prototypes.index.tolist() == list(range(ROWS))
    dist.barrier()
    rest = begun(folder)
    rest.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert rest.loss.loss.calls == whole.loss.loss.calls[4:]
    assert_same_on_every_rank(flat(rest))
    assert torch.equal(flat(rest), flat(whole))


@on_two_processes
def an_online_run_without_labels_is_resumed_with_the_queue_of_each(rank, world_size, folder):
    folder = folder / "an_online_run_without_labels_is_resumed_with_the_queue_of_each"
    options = {"data": pairs().remove_columns("label")}
    whole = begun(folder, loss=online(), **options)
    whole.train()
    dist.barrier()
    assert sorted(file.name for file in (folder / "checkpoint-4").glob("proto_*")) == [
        "proto_heads.pt",
        "proto_loss_0_of_2.pt",
        "proto_loss_1_of_2.pt",
    ]
    rest = begun(folder, loss=online(), **options)
    rest.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert isinstance(rest.loss.loss.prototypes, OnlinePrototypes)
    assert rest.loss.loss.prototypes.step == whole.loss.loss.prototypes.step == 6
    assert_same_on_every_rank(flat(rest))
    assert torch.equal(flat(rest), flat(whole))


@on_two_processes
def data_that_are_wrong_on_one_process_are_an_error_on_both(rank, world_size, folder):
    data = pairs().remove_columns("label") if rank else pairs()
    raises_everywhere(begun(folder / "data", data=data).train, 1, ValueError, "train_dataset must have a column label")
    run = begun(folder / "heads", heads={"dim": 8, "hidden_dim": 16 + rank, "norm": "layer"})
    with pytest.raises(ValueError, match="ranks must agree on the heads"):
        run.train()


@on_two_processes
def the_trainers_default_for_unused_parameters_is_an_error_that_says_what_to_set(rank, world_size, folder):
    run = begun(folder / "default", loss=Recorded(), arguments={"ddp_find_unused_parameters": None, "save_strategy": "no"})
    with pytest.raises(ValueError, match="ddp_find_unused_parameters must be False for a model with two towers"):
        run.train()

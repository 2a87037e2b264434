"""ProtoCLIPTrainer with data sets whose items are of any kind, and with teachers that do not fit them."""

import warnings
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from hf_trainer import Recorded, trainer
from host_pairs import PicturePairs
from torch.utils.data import IterableDataset
from transformers import BatchFeature, Trainer, default_data_collator

from protoclip_losses import TeacherAdapter

ROWS = 22


@pytest.fixture(scope="module")
def pairs():
    return PicturePairs(ROWS)


@dataclass
class Sample:
    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def stacked(items):
    """A collator of tuples, which leaves broken samples out."""
    columns = zip(*(item for item in items if item is not None), strict=True)
    return dict(zip(("pixel_values", "input_ids", "attention_mask"), map(torch.stack, columns), strict=True))


def texts_and_pictures(pairs):
    """A collator of strings: the numbers of the pairs."""
    return lambda items: BatchFeature({**default_data_collator([pairs[int(item)] for item in items])})


KINDS = {
    "dict": (dict, None),
    "BatchFeature": (lambda item: BatchFeature(item), None),
    "dataclass": (lambda item: Sample(**item), None),
    "tuple": (lambda item: tuple(item.values()), stacked),
    "list": (lambda item: list(item.values()), stacked),
}
ARGUMENTS = {"save_steps": 100}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop", [True, False])
def test_what_trainer_takes_as_items(tmp_path, pairs, kind, drop):
    make, collate = KINDS[kind]
    data, loss = [make(pairs[i]) for i in range(ROWS)], Recorded()
    arguments = {**ARGUMENTS, "remove_unused_columns": drop}
    run = trainer(tmp_path, data, loss=loss, data_collator=collate, arguments=arguments)
    run.train()
    usual = trainer(tmp_path, pairs, loss=Recorded(), arguments=ARGUMENTS)
    usual.train()
    assert loss.calls == usual.loss.calls
    assert sorted(loss.samples[:ROWS]) == list(range(ROWS))


def test_items_that_are_strings_or_tensors_for_a_collator_that_takes_them(tmp_path, pairs):
    for data in ([str(i) for i in range(ROWS)], list(torch.arange(ROWS))):
        loss = Recorded()
        trainer(tmp_path, data, loss=loss, data_collator=texts_and_pictures(pairs), arguments=ARGUMENTS).train()
        assert sorted(loss.samples[:ROWS]) == list(range(ROWS))


def test_broken_samples_that_the_collator_leaves_out(tmp_path, pairs):
    broken, loss = {3, 8, 15}, Recorded()
    data = [None if i in broken else tuple(pairs[i].values()) for i in range(ROWS)]
    run = trainer(tmp_path, data, loss=loss, data_collator=stacked, arguments={**ARGUMENTS, "num_train_epochs": 3})
    run.train()
    for epoch in range(3):
        assert sorted(loss.samples[epoch * 19 : (epoch + 1) * 19]) == sorted({*range(ROWS)} - broken)
    assert len(loss.prototypes.index) == 19


def test_an_own_column_named_index_is_not_taken_for_the_number(tmp_path, pairs):
    data = [{**pairs[i], "index": 1000 + i} for i in range(ROWS)]
    for drop in (True, False):
        loss = Recorded()
        trainer(tmp_path, data, loss=loss, arguments={**ARGUMENTS, "remove_unused_columns": drop}).train()
        assert sorted(loss.samples[:ROWS]) == list(range(ROWS))


@pytest.mark.parametrize(
    ("item", "got"), [(None, "NoneType"), ("a cat", "str"), (torch.zeros(3, 8, 8), "Tensor"), ((1, 2), "tuple"), (5, "int")]
)
def test_an_item_that_no_batch_can_be_made_of_is_named(tmp_path, pairs, item, got):
    data = [item if item is not None or i == 7 else pairs[i] for i in range(ROWS)]
    with pytest.raises(TypeError, match=rf"train_dataset\[\d+\] must be a mapping or a dataclass .*, got {got}: ") as error:
        trainer(tmp_path, data, warmup_epochs=0, arguments=ARGUMENTS).train()
    if item is None:
        assert "train_dataset[7]" in str(error.value)


def test_a_collator_that_makes_no_mapping_or_keeps_broken_samples_is_an_error(tmp_path, pairs):
    data = [tuple(pairs[i].values()) for i in range(ROWS)]
    with pytest.raises(TypeError, match="data_collator made a tuple of such items"):
        trainer(tmp_path, data, data_collator=lambda items: tuple(items), arguments=ARGUMENTS).train()
    data[4] = None
    filled = lambda items: stacked([item or data[0] for item in items])  # noqa: E731
    with pytest.raises(ValueError, match="data_collator must leave out the 1 items that are None, got 11 rows"):
        trainer(tmp_path, data, data_collator=filled, arguments=ARGUMENTS).train()


def test_an_error_of_the_collator_is_its_own(tmp_path, pairs):
    def fails(items):
        raise KeyError("no such column")

    with pytest.raises(KeyError, match="no such column"):
        trainer(tmp_path, pairs, data_collator=fails, arguments=ARGUMENTS).train()


def test_a_stream_with_a_length_is_still_a_stream(tmp_path):
    class Stream(IterableDataset):
        def __len__(self):
            return ROWS

        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="train_dataset must have a length and be read by number, got Stream"):
        trainer(tmp_path, Stream())


def teacher(rows, **options):
    return {"words": TeacherAdapter.from_tensor(torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)), **options)}


def test_a_teacher_with_other_rows_than_the_data_is_noticed_once_and_before_training(tmp_path, pairs):
    with pytest.warns(UserWarning, match=r"teachers\['words'\] has 30 rows and train_dataset 22 samples"):
        run = trainer(tmp_path, pairs, teachers=teacher(30), warmup_epochs=0, arguments=ARGUMENTS)
    with warnings.catch_warnings(record=True) as more:
        run.train()
    assert not [w for w in more if "rows" in str(w.message)]
    with pytest.raises(
        ValueError, match=r"teachers\['words'\] must have a row for each of the 22 samples of train_dataset, got 9"
    ):
        trainer(tmp_path, pairs, teachers=teacher(9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path, pairs, teachers=teacher(22))
        trainer(tmp_path, pairs, teachers=teacher(30, index=torch.arange(30)))


def test_the_default_number_of_prototypes_is_that_of_the_episode(tmp_path, pairs):
    run = trainer(tmp_path, pairs, num_prototypes=None)
    assert run.clusterer.num_prototypes == 2
    assert trainer(tmp_path, pairs, num_prototypes=None, episode_size=9).clusterer.num_prototypes == 1


def test_evaluation_takes_the_same_items_as_trainer(tmp_path, pairs):
    data = [tuple(pairs[i].values()) for i in range(ROWS)]
    collate = lambda items: {**stacked(items), "return_loss": True}  # noqa: E731
    found = [
        trainer(tmp_path, data, cls, eval_dataset=data, data_collator=collate).evaluate()["eval_loss"]
        for cls in (Trainer, trainer(tmp_path, data).__class__)
    ]
    assert found[0] == found[1]

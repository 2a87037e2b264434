"""EpisodeSampler and FeatureBank."""

import random
import warnings
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from cases import unit
from helpers import in_new_process

from protoclip_losses import EpisodeSampler, FeatureBank


def first_episodes(sampler, count=3):
    return [episode.index for episode, _ in zip(sampler, range(count), strict=False)]


@pytest.mark.parametrize(("dataset_size", "episode_size"), [(1000, 300), (7, 7), (50, 1)])
def test_an_episode_is_drawn_without_replacement(dataset_size, episode_size):
    for index in first_episodes(EpisodeSampler(dataset_size, episode_size)):
        assert index.dtype == torch.int64
        assert index.shape == (episode_size,)
        assert len(index.unique()) == episode_size
        assert index.min() >= 0
        assert index.max() < dataset_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_shards_partition_the_episode(world_size):
    episode = EpisodeSampler(100, 31).episode(0)
    shards = [episode.shard(rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(shards).sort().values, episode.index.sort().values)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world_is_an_error(rank, world_size):
    with pytest.raises(ValueError, match=rf"rank must lie in \[0, world_size={world_size}\), got {rank}"):
        EpisodeSampler(10, 5).episode(0).shard(rank, world_size)


def test_a_draw_depends_on_seed_and_number_alone():
    """Not on global random state, which it leaves alone, nor on what was drawn before."""
    expected = EpisodeSampler(200, 50, seed=3).episode(4).index
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sampler = EpisodeSampler(200, 50, seed=3)
    sampler.episode(9)
    drawn = first_episodes(sampler, 5)
    assert torch.equal(drawn[4], expected)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_another_process_draws_the_same(tmp_path):
    in_new_process(
        """
import sys, torch
from protoclip_losses import EpisodeSampler
torch.manual_seed(123)
torch.save(EpisodeSampler(500, 100, seed=2).episode(7).index, sys.argv[1] + "/index.pt")
""",
        tmp_path,
    )
    assert torch.equal(torch.load(tmp_path / "index.pt", weights_only=True), EpisodeSampler(500, 100, seed=2).episode(7).index)


def test_the_draw_is_the_same_in_every_version():
    """A run that was saved with an older version goes on with the same episodes."""
    assert EpisodeSampler(10, 4).episode(0).index.tolist() == [7, 0, 9, 2]
    assert EpisodeSampler(1000, 4, seed=7).episode(3).index.tolist() == [711, 719, 40, 379]


def stored(x):
    """Bytes that a tensor keeps alive and that saving it writes."""
    return x.untyped_storage().nbytes()


def test_an_episode_keeps_its_own_samples_alone():
    """And not the permutation of the data set that they were drawn from: 24 MB for 1.6."""
    episode = EpisodeSampler(3_000_000, 200_000).episode(0)
    assert stored(episode.index) == 200_000 * 8
    assert stored(episode.shard(1, 4)) == 50_000 * 8
    assert stored(FeatureBank(torch.arange(1000)[:10], dim=3).state_dict()["index"]) == 80


def test_the_state_of_0_6_is_read():
    sampler = EpisodeSampler(100, 10, seed=5)
    sampler.load_state_dict({"number": 2, "dataset_size": 100, "episode_size": 10, "seed": 5})
    assert next(iter(sampler)).number == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({name: None}, f"got one without '{name}'") for name in ("number", "dataset_size", "episode_size", "seed")],
        ({"number": -1}, r"state_dict\['number'\] of EpisodeSampler must be an int of at least 0, got -1"),
        ({"number": 1.5}, "must be an int of at least 0, got 1.5"),
        ({"format": 2}, "state_dict of EpisodeSampler must have format 1 or earlier, got 2"),
    ],
)
@pytest.mark.parametrize("is_of_0_6", [False, True])
def test_a_state_that_does_not_fit_is_an_error_that_names_its_entry(change, message, is_of_0_6):
    sampler, other = EpisodeSampler(100, 10), EpisodeSampler(100, 10)
    next(iter(other))
    state = {name: value for name, value in {**other.state_dict(), **change}.items() if value is not None}
    if is_of_0_6 and "format" not in change:
        del state["format"]
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)
    assert sampler.number == 0


def test_samplers_and_episodes_print_what_they_are():
    sampler = EpisodeSampler(10, 4, seed=3, episodes=7)
    next(iter(sampler))
    assert repr(sampler) == "EpisodeSampler(dataset_size=10, episode_size=4, seed=3, episodes=7, number=1)"
    assert repr(sampler.episode(2)) == "Episode(number=2, 4 samples)"


def test_seeds_and_numbers_give_different_draws():
    draws = [tuple(EpisodeSampler(100, 30, seed=s).episode(n).index.tolist()) for s in range(6) for n in range(6)]
    assert len(set(draws)) == 36


def test_every_sample_is_drawn_equally_often():
    sampler, episodes = EpisodeSampler(60, 20, seed=1), 900
    counts = torch.bincount(torch.cat(first_episodes(sampler, episodes)), minlength=60)
    expected = episodes / 3
    # Each count is binomial; five of its standard deviations.
    assert (counts - expected).abs().max() < 5 * (episodes * (1 / 3) * (2 / 3)) ** 0.5


def test_an_episode_is_a_constant():
    with pytest.raises(FrozenInstanceError):
        EpisodeSampler(10, 4).episode(0).number = 1


def test_the_order_within_an_episode_is_random_too():
    first = torch.stack([EpisodeSampler(10, 10, seed=s).episode(0).index for s in range(40)])
    assert all(len(column.unique()) > 5 for column in first.T)


def test_number_is_the_next_to_be_drawn():
    sampler = EpisodeSampler(10, 4)
    assert sampler.number == 0
    assert [episode.number for episode, _ in zip(sampler, range(2), strict=False)] == [0, 1]
    sampler = EpisodeSampler(10, 4)
    assert sampler.episode(5).number == 5
    assert sampler.number == 0
    assert next(iter(sampler)).number == 0
    assert sampler.number == 1


def test_a_sampler_ends_after_its_episodes_or_never():
    sampler = EpisodeSampler(10, 4, episodes=3)
    assert [episode.number for episode in sampler] == [0, 1, 2]
    assert list(sampler) == []
    resumed = EpisodeSampler(10, 4, episodes=5)
    resumed.load_state_dict(sampler.state_dict())
    assert [episode.number for episode in resumed] == [3, 4]
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        EpisodeSampler(10, 4, episodes=0)


def test_a_sampler_goes_on_where_its_state_was():
    sampler = EpisodeSampler(100, 10, seed=5)
    expected = first_episodes(EpisodeSampler(100, 10, seed=5), 4)
    next(iter(sampler)), next(iter(sampler))
    state = sampler.state_dict()
    assert state == {"format": 1, "number": 2, "dataset_size": 100, "episode_size": 10, "seed": 5}
    resumed = EpisodeSampler(100, 10, seed=5)
    resumed.load_state_dict(state)
    assert torch.equal(torch.stack(first_episodes(resumed, 2)), torch.stack(expected[2:]))


@pytest.mark.parametrize(("name", "value"), [("dataset_size", 101), ("episode_size", 11), ("seed", 6)])
def test_the_state_of_another_sampler_is_an_error(name, value):
    arguments = {"dataset_size": 100, "episode_size": 10, "seed": 5}
    sampler = EpisodeSampler(**{**arguments, name: value})
    with pytest.raises(ValueError, match=f"state_dict has {name}={arguments[name]} but this EpisodeSampler has {name}={value}"):
        sampler.load_state_dict(EpisodeSampler(**arguments).state_dict())
    assert sampler.number == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 11), ValueError, "episode_size must be at most dataset_size=10, got 11"),
        ((0, 1), ValueError, "dataset_size must be at least 1, got 0"),
        ((10, 0), ValueError, "episode_size must be at least 1, got 0"),
        ((10, 2.5), TypeError, "episode_size must be an int, got float"),
        ((10.0, 2), TypeError, "dataset_size must be an int, got float"),
    ],
)
def test_bad_sizes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        EpisodeSampler(*arguments)


@pytest.mark.parametrize("seed", [1.5, True, "a"])
def test_a_seed_is_an_int(seed):
    with pytest.raises(TypeError, match=f"seed must be an int, got {type(seed).__name__}"):
        EpisodeSampler(10, 2, seed=seed)


def test_bad_seeds_and_numbers_are_named():
    with pytest.raises(ValueError, match="number must be at least 0, got -1"):
        EpisodeSampler(10, 2).episode(-1)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        EpisodeSampler(10, 2, seed=-1)


INDEX = torch.tensor([30, 10, 50, 20])
IMAGE, TEXT = unit(60, 3, 1, torch.float32), unit(60, 3, 2, torch.float32)


def write(bank, samples, **others):
    index = torch.tensor(samples)
    bank.update(index, IMAGE[index], TEXT[index], **{name: x[index] for name, x in others.items()})


def test_rows_are_written_by_sample_in_any_order():
    bank = FeatureBank(INDEX, dim=3)
    write(bank, [20, 30])
    write(bank, [50])
    write(bank, [10])
    assert bank.missing == 0
    assert bank.modalities == ("image", "text")
    assert torch.equal(bank.features["image"], IMAGE[INDEX])
    assert torch.equal(bank.features["text"], TEXT[INDEX])


def test_a_row_can_be_written_again():
    bank = FeatureBank(INDEX, dim=3)
    bank.update(INDEX, torch.zeros(4, 3), torch.zeros(4, 3))
    write(bank, [50])
    assert torch.equal(bank.features["text"], TEXT[INDEX].where((INDEX == 50)[:, None], 0))


def test_a_sample_that_the_bank_holds_twice_is_written_twice():
    index = torch.tensor([5, 7, 5, 1, 5])
    bank = FeatureBank(index, dim=3)
    write(bank, [7, 5])
    assert bank.written.tolist() == [True, True, True, False, True]
    write(bank, [1])
    assert torch.equal(bank.features["image"], IMAGE[index])
    assert torch.equal(bank.features["text"], TEXT[index])


def test_a_sample_given_twice_at_once_is_fine():
    bank = FeatureBank(torch.tensor([5, 7, 5]), dim=3)
    write(bank, [7, 5, 7, 5])
    assert torch.equal(bank.features["image"], IMAGE[[5, 7, 5]])


def test_rows_never_written_are_counted_and_zero():
    bank = FeatureBank(INDEX, dim=3)
    assert bank.missing == 4
    write(bank, [50, 50, 10])
    assert bank.missing == 2
    assert bank.written.tolist() == [False, True, True, False]
    assert (bank.features["image"][~bank.written] == 0).all()
    with pytest.raises(ValueError, match="2 of 4 rows were never written"):
        bank.require_complete()
    write(bank, [20, 30])
    bank.require_complete()


@pytest.mark.parametrize(("samples", "message"), [([10, 11], "1 of 2 .*sample 11"), ([9, 99, 10], "2 of 3 .*sample 9,")])
def test_an_unknown_sample_is_an_index_error_and_writes_nothing(samples, message):
    bank = FeatureBank(INDEX, dim=3)
    with pytest.raises(IndexError, match=message):
        bank.update(torch.tensor(samples), IMAGE[: len(samples)], TEXT[: len(samples)])
    assert bank.missing == 4
    assert bank.modalities == ()


@pytest.mark.parametrize("name", ["image_features", "text_features"])
def test_the_first_update_has_the_width_of_the_bank(name):
    good = {"image_features": IMAGE[:4], "text_features": TEXT[:4]}
    with pytest.raises(ValueError, match=rf"{name} must have width 3 .*got shape \(4, 2\)"):
        FeatureBank(INDEX, dim=3).update(INDEX, **{**good, name: torch.ones(4, 2)})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": torch.tensor([10.0, 20.0])}, TypeError, "index must be int64"),
        ({"index": torch.tensor([10])}, ValueError, r"image_features must have 1 rows as index"),
        ({"image_features": torch.ones(2, 4)}, ValueError, r"image_features must have width 3 .*got shape \(2, 4\)"),
        ({"text_features": torch.ones(2, 4)}, ValueError, r"text_features must have width 3 .*got shape \(2, 4\)"),
        ({"text_features": torch.ones(3, 3)}, ValueError, "text_features must have 2 rows as index"),
        ({"image_features": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "image_features must be float16"),
        ({"audio": torch.ones(2, 4)}, ValueError, "audio_features must have width 2 "),
        ({"audio": torch.ones(3, 2)}, ValueError, "audio_features must have 2 rows"),
        ({"audio": None}, TypeError, "audio_features must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_updates_are_named_and_write_nothing(change, error, message):
    bank = FeatureBank(INDEX, dim=3)
    write(bank, [30], audio=torch.ones(60, 2))
    good = {"index": torch.tensor([10, 20]), "image_features": IMAGE[:2], "text_features": TEXT[:2], "audio": torch.ones(2, 2)}
    with pytest.raises(error, match=message):
        bank.update(**{**good, **change})
    assert bank.missing == 3


def test_modalities_stay_those_of_the_first_update():
    bank = FeatureBank(INDEX, dim=3)
    write(bank, [30], audio=torch.ones(60, 2))
    assert bank.modalities == ("image", "text", "audio")
    assert bank.features["audio"].shape == (4, 2)
    with pytest.raises(ValueError, match=r"modalities \['audio', 'image', 'text'\] as before, got \['image', 'text'\]"):
        write(bank, [10])
    with pytest.raises(ValueError, match=r"as before, got \['depth', 'image', 'text'\]"):
        write(bank, [10], depth=torch.ones(60, 2))
    assert bank.missing == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_are_stored_in_the_type_of_the_bank(dtype):
    bank = FeatureBank(INDEX, dim=3, dtype=dtype)
    write(bank, INDEX.tolist())
    assert torch.equal(bank.features["image"], IMAGE[INDEX].to(dtype))


def test_the_bank_holds_no_graph():
    bank = FeatureBank(INDEX, dim=3)
    bank.update(INDEX, IMAGE[INDEX].requires_grad_(), TEXT[INDEX].requires_grad_())
    assert not bank.features["image"].requires_grad


def test_nan_is_stored_as_it_is():
    bank = FeatureBank(INDEX, dim=3)
    bank.update(INDEX, torch.full((4, 3), torch.nan), TEXT[INDEX])
    assert bank.features["image"].isnan().all()
    assert bank.missing == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"index": [1, 2]}, TypeError, "index must be a torch.Tensor, got list"),
        ({"index": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "index must have 1 dimension"),
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"dtype": torch.int64}, TypeError, r"dtype must be float16, bfloat16, float32 or float64, got torch\.int64"),
    ],
)
def test_bad_banks_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FeatureBank(**{"index": INDEX, "dim": 3, **arguments})


def test_the_bank_lies_on_the_device_asked_for():
    bank = FeatureBank(INDEX, dim=3, device="meta")
    assert bank.index.device.type == bank.written.device.type == "meta"
    assert FeatureBank(INDEX, dim=3, device="cpu").index.device.type == "cpu"


def test_an_empty_share_is_complete_once_it_knows_its_modalities():
    bank = FeatureBank(INDEX[:0], dim=3)
    with pytest.raises(ValueError, match="bank must be complete"):
        bank.require_complete()
    bank.update(INDEX[:0], IMAGE[:0], TEXT[:0])
    bank.require_complete()
    assert bank.features["text"].shape == (0, 3)


def test_a_bank_of_features_that_are_there():
    audio = unit(60, 2, 3, torch.float32)
    bank = FeatureBank.from_features(INDEX, image=IMAGE[INDEX], text=TEXT[INDEX], audio=audio[INDEX])
    written = FeatureBank(INDEX, dim=3)
    write(written, INDEX.tolist(), audio=audio)
    bank.require_complete()
    assert (len(bank), bank.dim, bank.dtype) == (4, 3, torch.float32)
    assert bank.modalities == written.modalities == ("image", "text", "audio")
    assert all(torch.equal(x, written.features[name]) for name, x in bank.features.items())
    assert torch.equal(bank.index, INDEX)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_type_of_storage_is_asked_for_and_not_the_features(dtype):
    rows = IMAGE[INDEX].to(dtype)
    assert FeatureBank.from_features(INDEX, rows, rows).features["image"].dtype == torch.float32
    assert FeatureBank.from_features(INDEX, rows, rows, dtype=dtype).features["text"].dtype == dtype


def test_a_bank_of_features_lies_on_their_device():
    """The samples are looked up by an index on the CPU, whose values can be read when those on the device cannot."""
    for device in ("cpu", "meta"):
        bank = FeatureBank.from_features(INDEX, IMAGE[INDEX].to(device), TEXT[INDEX].to(device))
        assert {bank.index.device.type, bank.written.device.type, bank.features["image"].device.type} == {device}
    with pytest.raises(IndexError, match="not in it"):
        bank.update(INDEX.max()[None] + 1, IMAGE[:1].to("meta"), TEXT[:1].to("meta"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": None}, TypeError, "image_features must be a torch.Tensor, got NoneType"),
        ({"text": TEXT[:4, :2]}, ValueError, "text_features must have width 3"),
        ({"text": TEXT[:3]}, ValueError, "text_features must have 4 rows"),
        ({"audio": torch.ones(5, 2)}, ValueError, "audio_features must have 4 rows"),
        ({"index": INDEX.float()}, TypeError, "index must be int64"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float16"),
    ],
)
def test_bad_features_of_a_bank_are_named(change, error, message):
    with pytest.raises(error, match=message):
        FeatureBank.from_features(**{"index": INDEX, "image": IMAGE[:4], "text": TEXT[:4], **change})


def test_a_bank_has_a_length_and_prints_what_it_is():
    bank = FeatureBank(INDEX, dim=3, dtype=torch.float16)
    assert len(bank) == 4
    assert repr(bank) == "FeatureBank(4 samples, dim=3, modalities=[], missing=4, torch.float16 on cpu)"
    write(bank, [30])
    assert repr(bank) == "FeatureBank(4 samples, dim=3, modalities=['image', 'text'], missing=3, torch.float16 on cpu)"
    assert "missing=unknown" in repr(FeatureBank(INDEX, dim=3, device="meta"))


def test_a_forgotten_no_grad_is_said_once():
    bank, layer = FeatureBank(INDEX, dim=3), torch.nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"features \['text'\] were computed with gradients.*torch\.no_grad\(\)"):
        bank.update(INDEX[:2], IMAGE[:2], layer(TEXT[:2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank.update(INDEX[2:], IMAGE[:2], layer(TEXT[:2]))
        FeatureBank(INDEX, dim=3).update(INDEX, IMAGE[:4].requires_grad_(), TEXT[:4])  # a leaf has no graph
    assert not bank.features["text"].requires_grad


def test_the_state_of_a_bank_of_0_6_is_read():
    bank = FeatureBank(INDEX, dim=3)
    write(bank, [30, 50])
    state = {name: bank.state_dict()[name] for name in ("index", "written", "features")}
    other = FeatureBank(INDEX, dim=3)
    other.load_state_dict(state)
    assert other.missing == 2
    assert torch.equal(other.features["text"], bank.features["text"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"written": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"'written'\] must have shape \(4,\) as index has, got \(3,\)",
        ),
        ({"written": torch.ones(4)}, TypeError, r"'written'\] must be a bool tensor, got torch.float32"),
        ({"written": [True] * 4}, TypeError, r"'written'\] must be a bool tensor, got list"),
        ({"index": INDEX.tolist()}, TypeError, r"'index'\] must be a torch.Tensor, got list"),
        ({"features": {}}, ValueError, r"must hold the features of \['image', 'text'\], got \[\]"),
        ({"features": {"image": IMAGE[:4]}}, ValueError, r"must hold the features of \['image', 'text'\], got \['image'\]"),
        ({"features": {"image": IMAGE[:4], "text": None}}, TypeError, "text_features must be a torch.Tensor, got NoneType"),
        ({"format": 2}, ValueError, "state_dict of FeatureBank must have format 1 or earlier, got 2"),
        *[({name: None}, ValueError, f"got one without '{name}'") for name in ("index", "written", "features", "modalities")],
    ],
)
def test_a_state_of_a_bank_that_does_not_fit_changes_nothing(change, error, message):
    bank, other = FeatureBank(INDEX, dim=3), FeatureBank(INDEX, dim=3)
    write(other, INDEX.tolist())
    state = {name: value for name, value in {**other.state_dict(), **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        bank.load_state_dict(state)
    assert (bank.missing, bank.modalities) == (4, ())


def test_flags_of_0_6_without_features_are_an_error():
    bank = FeatureBank(INDEX, dim=3)
    with pytest.raises(ValueError, match="must hold features of the 4 rows that it calls written, got none"):
        bank.load_state_dict({"index": INDEX, "written": torch.ones(4, dtype=torch.bool), "features": {}})
    assert bank.missing == 4


def test_a_fresh_bank_does_not_load_as_complete_without_features(tmp_path):
    """torch.distributed.checkpoint reads into the state of a fresh object and leaves out, in silence, what that has not."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    bank, fresh, filled = (FeatureBank(INDEX, dim=3) for _ in range(3))
    write(bank, INDEX.tolist())
    filled.update(INDEX, torch.zeros(4, 3), torch.zeros(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is distributed here
        checkpoint.save({"bank": bank}, checkpoint_id=tmp_path)
        with pytest.raises(ValueError, match=r"must hold the features of \['image', 'text'\], got \[\]"):
            checkpoint.load({"bank": fresh}, checkpoint_id=tmp_path)
        checkpoint.load({"bank": filled}, checkpoint_id=tmp_path)
    assert (fresh.missing, fresh.modalities) == (4, ())
    assert torch.equal(filled.features["text"], bank.features["text"])


def test_a_saved_bank_goes_on_in_a_new_process_in_the_middle_of_extraction(tmp_path):
    bank = FeatureBank(INDEX, dim=3, dtype=torch.float16)
    audio = unit(60, 2, 3, torch.float32)
    write(bank, [50, 30], audio=audio)
    torch.save({"bank": bank.state_dict(), "rest": (IMAGE, TEXT, audio)}, tmp_path / "bank.pt")
    in_new_process(
        """
import sys, torch
from protoclip_losses import FeatureBank
saved = torch.load(sys.argv[1] + "/bank.pt", weights_only=True)
bank = FeatureBank(saved["bank"]["index"], dim=3, dtype=torch.float16)
bank.load_state_dict(saved["bank"])
assert bank.missing == 2
todo = bank.index[~bank.written]
image, text, audio = (x[todo] for x in saved["rest"])
bank.update(todo, image, text, audio=audio)
bank.require_complete()
torch.save(bank.state_dict(), sys.argv[1] + "/bank.pt")
""",
        tmp_path,
    )
    write(bank, [20, 10], audio=audio)
    finished = torch.load(tmp_path / "bank.pt", weights_only=True)
    assert torch.equal(finished["index"], INDEX)
    assert finished["written"].all()
    assert list(finished["features"]) == ["image", "text", "audio"]
    assert all(torch.equal(x, bank.features[name]) for name, x in finished["features"].items())
    assert finished["features"]["image"].dtype == torch.float16


def test_loading_casts_to_the_type_of_the_bank():
    bank, wide = FeatureBank(INDEX, dim=3, dtype=torch.float16), FeatureBank(INDEX, dim=3)
    write(wide, INDEX.tolist())
    bank.load_state_dict(wide.state_dict())
    assert torch.equal(bank.features["image"], IMAGE[INDEX].half())


def test_a_loaded_bank_shares_no_memory_with_the_one_saved():
    bank, other = FeatureBank(INDEX, dim=3), FeatureBank(INDEX, dim=3)
    write(bank, [30])
    other.load_state_dict(bank.state_dict())
    write(other, [10, 20, 50])
    assert bank.missing == 3
    assert (bank.features["image"][1:] == 0).all()


def test_the_state_of_another_bank_is_an_error():
    bank = FeatureBank(INDEX, dim=3)
    for other in (INDEX.flip(0), INDEX[:3]):
        with pytest.raises(ValueError, match="state_dict holds other samples than this bank"):
            bank.load_state_dict(FeatureBank(other, dim=3).state_dict())
    narrow = FeatureBank(INDEX, dim=2)
    narrow.update(INDEX, IMAGE[INDEX, :2], TEXT[INDEX, :2])
    with pytest.raises(ValueError, match="image_features must have width 3 as this bank has"):
        bank.load_state_dict(narrow.state_dict())
    short = {name: x[:2] for name, x in {"image": IMAGE, "text": TEXT}.items()}
    with pytest.raises(ValueError, match="image_features must have 4 rows"):
        bank.load_state_dict({**FeatureBank(INDEX, dim=3).state_dict(), "features": short, "modalities": ["image", "text"]})

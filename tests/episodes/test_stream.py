"""StreamEpisodes: episodes over shards without an index."""

import collections
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import in_new_process
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclip_losses import StreamEpisodes

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
SIZES = [5, 3, 0, 7, 1, 4, 6, 2]  # lines of each shard, one of them empty


def write_lines(folder, sizes=SIZES):
    """Shards that are files of lines, each line naming its shard and its row."""
    for shard, size in enumerate(sizes):
        (folder / f"{shard}.txt").write_text("".join(f"{shard}/{row}\n" for row in range(size)))
    return [str(folder / f"{shard}.txt") for shard in range(len(sizes))]


def read(path):
    with open(path) as file:
        yield from file


def decode(line):
    return line.strip()


@pytest.fixture
def stream(tmp_path):
    return StreamEpisodes(write_lines(tmp_path), len(SIZES), seed=3)


def passed(passing):
    return [(index.tolist(), batch) for index, batch in passing]


def samples(passing):
    """Samples by number; a number that is given twice is an error."""
    pairs = [pair for index, batch in passing for pair in zip(index.tolist(), batch, strict=True)]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


# --- the order of shards ------------------------------------------------------------------------------------------------------


def test_each_round_holds_every_shard_once_in_an_order_of_its_own():
    shards = [f"{i}.tar" for i in range(10)]
    stream = StreamEpisodes(shards, 4)
    drawn = [shard for episode, _ in zip(stream, range(10), strict=False) for shard in episode.shards]
    rounds = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == shards for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4
    assert StreamEpisodes(shards, 4, seed=1).episode(0).shards != stream.episode(0).shards


def test_the_order_is_the_same_in_every_version_and_process():
    stream = StreamEpisodes([f"{i}.tar" for i in range(6)], 4, seed=2)
    drawn = ["".join(shard[0] for shard in stream.episode(number).shards) for number in (0, 1, 7)]
    assert drawn == ["3051", "2441", "3252"]
    out = in_new_process(
        """
from protoclip_losses import StreamEpisodes
stream = StreamEpisodes([f"{i}.tar" for i in range(6)], 4, seed=2)
print(*("".join(shard[0] for shard in stream.episode(number).shards) for number in (0, 1, 7)))
"""
    )
    assert out.split() == drawn


def test_a_stream_ends_after_its_episodes_or_never():
    assert [episode.number for episode in StreamEpisodes(["a", "b"], 1, episodes=3)] == [0, 1, 2]
    assert [episode.number for episode, _ in zip(StreamEpisodes(["a"], 1), range(50), strict=False)] == list(range(50))


def test_a_stream_goes_on_where_its_state_was():
    shards = [f"{i}.tar" for i in range(5)]
    stream = StreamEpisodes(shards, 2, seed=4)
    next(iter(stream)), next(iter(stream))
    resumed = StreamEpisodes(shards, 2, seed=4)
    resumed.load_state_dict(stream.state_dict())
    assert next(iter(resumed)) == stream.episode(2)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((["a", "b", "d"], 2, 0), "shards"), ((["a", "b", "c"], 1, 0), "shards_per_episode"), ((["a", "b", "c"], 2, 1), "seed")],
)
def test_the_state_of_another_stream_is_an_error(arguments, name):
    shards, shards_per_episode, seed = arguments
    other = StreamEpisodes(shards, shards_per_episode, seed=seed)
    next(iter(other))
    with pytest.raises(ValueError, match=f"state_dict has {name}="):
        StreamEpisodes(["a", "b", "c"], 2).load_state_dict(other.state_dict())


# --- numbers ------------------------------------------------------------------------------------------------------------------


def test_an_index_is_the_position_of_the_shard_and_the_row_in_it(stream):
    episode = stream.episode(0)
    found = samples(episode.batches(read, decode, 4))
    assert len(found) == sum(SIZES)
    for number, line in found.items():
        shard, row = line.split("/")
        assert episode.shards[number >> 32].endswith(f"/{shard}.txt")
        assert number % 2**32 == int(row)


@pytest.mark.parametrize("workers", [0, 1, 3, 9])
@pytest.mark.parametrize("world_size", [1, 3])
def test_both_passes_number_alike_for_any_ranks_workers_and_order(stream, workers, world_size):
    episode = stream.episode(1)
    wanted = samples(episode.batches(read, decode, 4))
    found = [
        samples(episode.batches(read, decode, 3, num_workers=workers, rank=rank, world_size=world_size, shuffle_buffer=8))
        for rank in range(world_size)
    ]
    assert sum(map(len, found)) == len(wanted)
    assert dict(collections.ChainMap(*found)) == wanted
    assert all(len({number >> 32 for number in one}) >= len(SIZES) // world_size - 1 for one in found)


def test_samples_are_shuffled_within_blocks_by_seed_and_episode(stream):
    def order(episode, shuffle_buffer=6):
        batches = episode.batches(read, decode, 4, shuffle_buffer=shuffle_buffer)
        return [number for index, _ in batches for number in index.tolist()]

    episode = stream.episode(0)
    plain, shuffled = order(episode, 1), order(episode)
    assert plain == sorted(plain)
    for start in range(0, len(plain), 6):
        assert sorted(shuffled[start : start + 6]) == plain[start : start + 6]
    assert shuffled != plain
    assert order(episode) == shuffled
    assert order(stream.episode(1)) != shuffled
    assert order(StreamEpisodes(stream.shards, len(SIZES), seed=9).episode(0)) != shuffled
    # Blocks are not all permuted alike.
    moves = {
        tuple(number - first for number, first in zip(shuffled[i : i + 6], plain[i : i + 6], strict=True)) for i in (0, 6, 12)
    }
    assert len(moves) > 1


def test_ranks_shuffle_differently(tmp_path):
    episode = StreamEpisodes(write_lines(tmp_path, [20, 20]), 2).episode(0)
    one, other = (
        [
            number % 2**32
            for index, _ in episode.batches(read, decode, 4, shuffle_buffer=20, rank=r, world_size=2)
            for number in index.tolist()
        ]
        for r in range(2)
    )
    assert sorted(one) == sorted(other)
    assert one != other


def test_no_more_than_a_block_is_held(tmp_path):
    lead, counts = [], collections.Counter()

    def counted(path):
        for line in read(path):
            counts["read"] += 1
            yield line

    shards = write_lines(tmp_path, [50, 50, 50])
    for index, _ in StreamEpisodes(shards, 3).episode(0).batches(counted, decode, 5, shuffle_buffer=10):
        counts["seen"] += len(index)
        lead.append(counts["read"] - counts["seen"])
    assert counts["seen"] == 150
    assert max(lead) == 5


# --- resume -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 9])
def test_a_pass_goes_on_after_any_batch(stream, workers):
    def fresh():
        return stream.episode(0).batches(read, decode, 2, num_workers=workers, shuffle_buffer=3)

    whole, states = [], []
    passing = fresh()
    for index, batch in passing:
        whole.append((index.tolist(), batch))
        states.append(passing.state_dict())
    assert len(whole) >= sum(SIZES) // 2
    for done, state in list(enumerate(states, 1))[:: 1 if workers == 0 else 4]:
        resumed = fresh()
        resumed.load_state_dict(state)
        assert passed(resumed) == whole[done:]
        assert resumed.samples == sum(SIZES)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    batch_size=st.integers(1, 7),
    shuffle_buffer=st.integers(1, 9),
    broken=st.sets(st.integers(0, 35)),
    data=st.data(),
)
def test_any_cut_gives_the_same_batches(sizes, batch_size, shuffle_buffer, broken, data):
    """Shards held in memory; some samples do not decode."""
    shards = {f"shard{i}": [(i, row) for row in range(size)] for i, size in enumerate(sizes)}
    opened = []

    def read(shard):
        opened.append(shard)
        return shards[shard]

    def decode(sample):
        if sample[0] * 6 + sample[1] in broken:
            raise OSError("cut short")
        return str(sample)

    def fresh():
        return (
            StreamEpisodes(list(shards), len(shards))
            .episode(2)
            .batches(read, decode, batch_size, shuffle_buffer=shuffle_buffer, max_dropped=1.0)
        )

    passing, whole, states = fresh(), [], []
    states.append(passing.state_dict())
    for index, batch in passing:
        whole.append((index.tolist(), batch))
        states.append(passing.state_dict())
    assert all(index for index, _ in whole)
    done = data.draw(st.integers(0, len(whole)))
    resumed = fresh()
    resumed.load_state_dict(states[done])
    opened.clear()
    assert passed(resumed) == whole[done:]
    assert (resumed.samples, resumed.dropped) == (passing.samples, passing.dropped)
    assert resumed.samples == sum(sizes)
    assert resumed.dropped == len(broken & {i * 6 + row for i, size in enumerate(sizes) for row in range(size)})


def test_shards_that_were_passed_are_not_opened_again(tmp_path):
    opened = []

    def noted(path):
        opened.append(path)
        return read(path)

    stream = StreamEpisodes(write_lines(tmp_path, [10] * 6), 6)
    passing = stream.episode(0).batches(noted, decode, 5, shuffle_buffer=5)
    for _ in zip(range(7), passing, strict=False):  # 35 of 60 samples
        pass
    state = passing.state_dict()
    opened.clear()
    resumed = stream.episode(0).batches(noted, decode, 5, shuffle_buffer=5)
    resumed.load_state_dict(state)
    assert len(passed(resumed)) == 5
    assert opened == list(stream.episode(0).shards[3:])


def test_sizes_that_workers_find_are_in_the_state(stream):
    passing = stream.episode(0).batches(read, decode, 4, num_workers=2)
    passed(passing)
    assert sorted(passing.state_dict()["shard_sizes"].tolist()) == sorted(SIZES)


def test_a_saved_pass_goes_on_in_a_new_process(stream, tmp_path):
    passing = stream.episode(0).batches(read, decode, 3, num_workers=2, shuffle_buffer=4)
    batches = iter(passing)
    for _ in range(4):
        next(batches)
    torch.save({"stream": stream.state_dict(), "pass": passing.state_dict()}, tmp_path / "state.pt")
    out = in_new_process(
        """
import json, sys, torch
from protoclip_losses import StreamEpisodes
from test_stream import SIZES, decode, passed, read
shards = [f"{sys.argv[1]}/{i}.txt" for i in range(len(SIZES))]
state = torch.load(sys.argv[1] + "/state.pt", weights_only=True)
stream = StreamEpisodes(shards, len(SIZES), seed=3)
stream.load_state_dict(state["stream"])
passing = next(iter(stream)).batches(read, decode, 3, num_workers=2, shuffle_buffer=4)
passing.load_state_dict(state["pass"])
print(json.dumps(passed(passing)))
""",
        tmp_path,
        folders=[Path(__file__).parent],
    )
    rest = passed(batches)
    assert len(rest) > 3
    assert [(index, batch) for index, batch in json.loads(out)] == rest


@pytest.mark.parametrize(
    ("number", "change", "name"),
    [
        (1, {}, "episode"),
        (0, {"batch_size": 5}, "batch_size"),
        (0, {"shuffle_buffer": 2}, "shuffle_buffer"),
        (0, {"num_workers": 3}, "num_workers"),
        (0, {"rank": 1, "world_size": 2}, "shard_ids"),
        (0, {"rank": 0, "world_size": 2}, "shard_ids"),
    ],
)
def test_the_state_of_another_pass_is_an_error(stream, number, change, name):
    settings = {"batch_size": 4, "num_workers": 0, **change}
    state = stream.episode(0).batches(read, decode, 4).state_dict()
    with pytest.raises(ValueError, match=f"state_dict has {name}=.* but this StreamPass has {name}="):
        stream.episode(number).batches(read, decode, **settings).load_state_dict(state)


def test_the_state_of_0_6_is_read(stream):
    """The names that 0.6 gave; it saved neither the seed nor the shards."""
    passing = stream.episode(0).batches(read, decode, 4, shuffle_buffer=3)
    batches = iter(passing)
    next(batches), next(batches)
    state = {
        "episode": 0,
        "batch_size": 4,
        "shuffle": 3,
        "places": [0, 1],
        "pieces": [2],
        "turn": 0,
        "sizes": passing.state_dict()["shard_sizes"],
        "samples": 8,
        "dropped": 0,
    }
    resumed = stream.episode(0).batches(read, decode, 4, shuffle_buffer=3)
    resumed.load_state_dict(state)
    assert passed(resumed) == passed(batches)
    with pytest.raises(ValueError, match="state_dict has shuffle_buffer=3 but this StreamPass has shuffle_buffer=5"):
        stream.episode(0).batches(read, decode, 4, shuffle_buffer=5).load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict has num_workers=1 but this StreamPass has num_workers=2"):
        stream.episode(0).batches(read, decode, 4, shuffle_buffer=3, num_workers=2).load_state_dict(state)
    names = hashlib.sha256("\0".join(stream.shards).encode()).hexdigest()
    settings = {"shards": names, "shards_per_episode": len(SIZES), "seed": 3}
    stream.load_state_dict({"number": 5, **settings})
    assert stream.number == 5
    with pytest.raises(ValueError, match="state_dict has seed=4 but this StreamEpisodes has seed=3"):
        stream.load_state_dict({"number": 6, **settings, "seed": 4})
    with pytest.raises(ValueError, match="state_dict has shards="):
        stream.load_state_dict({"number": 6, **settings, "shards": names[::-1]})
    assert stream.number == 5


def test_the_state_of_another_seed_or_of_other_shards_is_an_error(stream):
    state = stream.episode(0).batches(read, decode, 4).state_dict()
    for shards, seed, name in (
        (stream.shards, 4, "seed"),
        (stream.shards[::-1], 3, "shards"),
        ([*stream.shards[1:], "x"], 3, "shards"),
    ):
        other = StreamEpisodes(shards, len(SIZES), seed=seed).episode(0).batches(read, decode, 4)
        with pytest.raises(ValueError, match=f"state_dict has {name}=.* but this StreamPass has {name}="):
            other.load_state_dict(state)


def test_names_of_shards_are_told_apart_wherever_one_ends():
    one, other = StreamEpisodes(["a", "b\0c"], 1), StreamEpisodes(["a\0b", "c"], 1)
    with pytest.raises(ValueError, match="state_dict has shards="):
        other.load_state_dict(one.state_dict())
    named = StreamEpisodes(["caf\udce9.tar"], 1)  # bytes in a file's name that are no UTF-8
    named.load_state_dict(named.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            ({name: None}, f"got one without '{name}'")
            for name in (
                "episode",
                "seed",
                "shards",
                "batch_size",
                "shuffle_buffer",
                "shard_ids",
                "num_workers",
                "batches_read",
                "next_worker",
                "shard_sizes",
                "samples",
                "dropped",
            )
        ],
        ({"format": 2}, "state_dict of StreamPass must have format 1 or earlier, got 2"),
        ({"batches_read": [1, 2, 3]}, r"a number of batches for each of 2 workers as 'batches_read'.*got \[1, 2, 3\] and 1"),
        ({"next_worker": 2}, "one of them as 'next_worker', got .* and 2"),
        ({"next_worker": -1}, r"state_dict\['next_worker'\] of StreamPass must be an int of at least 0, got -1"),
        ({"samples": "8"}, r"state_dict\['samples'\] of StreamPass must be an int of at least 0, got '8'"),
        (
            {"shard_sizes": torch.zeros(3, dtype=torch.int64)},
            r"state_dict\['shard_sizes'\] must have 8 entries as the episode has",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(stream, change, message):
    passing, other = (stream.episode(0).batches(read, decode, 4, num_workers=2) for _ in range(2))
    next(iter(passing))
    before = other.state_dict()
    state = {name: value for name, value in {**passing.state_dict(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    after = other.state_dict()
    assert torch.equal(after.pop("shard_sizes"), before.pop("shard_sizes"))
    assert after == before


@pytest.mark.parametrize("name", ["number", "shards", "shards_per_episode", "seed"])
def test_a_state_of_a_stream_without_an_entry_names_it(name):
    stream = StreamEpisodes(["a", "b"], 1)
    state = {key: value for key, value in stream.state_dict().items() if key != name}
    with pytest.raises(ValueError, match=f"state_dict must be that of StreamEpisodes, got one without '{name}'"):
        stream.load_state_dict(state)


# --- samples that are left out --------------------------------------------------------------------------------------------------


def fails_for(*lines):
    def decode(line):
        if line.strip() in lines:
            raise OSError(f"{line.strip()} is cut short")
        return line.strip()

    return decode


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_does_not_decode_is_left_out_and_counted(stream, workers):
    bad = ("3/2", "0/0", "6/5")
    passing = stream.episode(0).batches(read, fails_for(*bad), 4, num_workers=workers)
    found = samples(passing)
    assert (passing.samples, passing.dropped) == (sum(SIZES), 3)
    whole = samples(stream.episode(0).batches(read, decode, 4))
    assert found == {number: line for number, line in whole.items() if line not in bad}


def test_too_many_of_them_are_an_error_that_shows_the_last(tmp_path):
    stream = StreamEpisodes(write_lines(tmp_path, [100]), 1)

    def never(line):
        raise KeyError("jpg")

    with pytest.raises(
        ValueError, match=r"decode failed for 16 of 16 samples, more than max_dropped=0\.01 allows.*KeyError: 'jpg'"
    ):
        passed(stream.episode(0).batches(read, never, 8))
    with pytest.raises(ValueError, match=r"sample 7 of .*0\.txt"):
        passed(stream.episode(0).batches(read, fails_for("0/7"), 8, max_dropped=0.0))
    assert stream.episode(0).batches(read, never, 8, max_dropped=1.0).dropped == 0
    passing = stream.episode(0).batches(read, never, 8, max_dropped=1.0)
    assert passed(passing) == []
    assert passing.dropped == 100


def test_an_error_without_a_message_is_named_by_its_type(stream):
    def no_picture(line):
        return next(iter([]))

    with pytest.raises(ValueError, match=r"the last time: StopIteration \(sample 3 of .*\.txt\)"):
        passed(StreamEpisodes(stream.shards[3:4], 1).episode(0).batches(read, no_picture, 4, max_dropped=0.0))


def test_the_share_is_of_all_samples_once_there_are_a_thousand(tmp_path):
    stream = StreamEpisodes(write_lines(tmp_path, [3000]), 1)
    late = [f"0/{row}" for row in range(2900, 2928)]
    assert len(samples(stream.episode(0).batches(read, fails_for(*late), 10))) == 2972
    with pytest.raises(ValueError, match="decode failed for"):
        samples(stream.episode(0).batches(read, fails_for(*late, *(f"0/{row}" for row in range(11))), 10))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_second_pass_can_be_held_to_what_the_first_has_seen(stream, workers):
    first = samples(stream.episode(0).batches(read, fails_for("5/1", "5/2"), 4))
    only = torch.tensor(list(first))[torch.randperm(len(first))]
    second = stream.episode(0).batches(read, decode, 4, num_workers=workers, only=only)
    assert samples(second) == first
    assert second.dropped == 0
    assert passed(stream.episode(0).batches(read, decode, 4, only=only[:0])) == []


def test_an_error_of_the_reader_is_not_swallowed(stream):
    with pytest.raises(FileNotFoundError):
        passed(StreamEpisodes(["nowhere.txt"], 1).episode(0).batches(read, decode, 4))


# --- arguments ------------------------------------------------------------------------------------------------------------------


def test_samples_are_collated_by_torch_or_by_the_caller(stream):
    episode = stream.episode(0)

    def lengths(line):
        return torch.tensor([len(line)]), line.strip()

    index, (length, lines) = next(iter(episode.batches(read, lengths, 4)))
    assert index.dtype == torch.int64
    assert length.shape == (4, 1)
    assert len(lines) == 4
    _, batch = next(iter(episode.batches(read, decode, 4, collate_fn="+".join)))
    assert batch.count("+") == 3


@pytest.mark.parametrize(
    ("old", "new", "value"), [("workers", "num_workers", 2), ("shuffle", "shuffle_buffer", 4), ("collate", "collate_fn", list)]
)
def test_the_keywords_of_0_6_work_with_a_warning(stream, old, new, value):
    with pytest.warns(FutureWarning, match=rf"batches\({old}=\) is deprecated and goes after 0\.7\.x: use {new}=") as warned:
        by_old = passed(stream.episode(0).batches(read, decode, 4, **{old: value}))
    assert warned[0].filename == __file__
    assert by_old == passed(stream.episode(0).batches(read, decode, 4, **{new: value}))
    for also in (value, 0):
        with pytest.raises(TypeError, match=f"batches must be given {new} alone, got {old} as well, its old name"):
            stream.episode(0).batches(read, decode, 4, **{old: value, new: also})


def test_they_print_what_they_are(stream):
    assert repr(stream) == "StreamEpisodes(8 shards, shards_per_episode=8, seed=3, episodes=None, number=0)"
    episode = StreamEpisodes(["a.tar", "b.tar"], 2).episode(1)
    assert repr(episode) == f"StreamEpisode(number=1, 2 shards from {episode.shards[0]!r} on, seed=0)"
    passing = stream.episode(0).batches(read, fails_for("3/1"), 4, shuffle_buffer=2, world_size=2)
    parts = "episode 0, 4 of 8 shards, batch_size=4, num_workers=0, shuffle_buffer=2"
    assert repr(passing) == f"StreamPass({parts}, samples=0, dropped=0)"
    passed(passing)
    assert re.fullmatch(rf"StreamPass\({parts}, samples=[1-9]\d*, dropped=[01]\)", repr(passing))


def test_further_arguments_reach_the_loader(stream):
    before = torch.get_rng_state()
    passed(stream.episode(0).batches(read, decode, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match="no_such"):
        passed(stream.episode(0).batches(read, decode, 4, no_such=1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: StreamEpisodes("cc3m/{0..9}.tar", 1), TypeError, "shards must be a list of strings, got a single str"),
        (lambda s: StreamEpisodes(["a", 3], 1), TypeError, "shards must be a list of strings, got int at position 1"),
        (lambda s: StreamEpisodes(["a"], 2), ValueError, "shards_per_episode must be at most the 1 shards, got 2"),
        (lambda s: StreamEpisodes(["a"], 0), ValueError, "shards_per_episode must be at least 1, got 0"),
        (lambda s: StreamEpisodes(["a"], 1, seed=-1), ValueError, "seed must be at least 0, got -1"),
        (lambda s: StreamEpisodes(["a"], 1, episodes=0), ValueError, "episodes must be at least 1, got 0"),
        (lambda s: s.episode(-1), ValueError, "number must be at least 0, got -1"),
        (lambda s: s.episode(0).batches(read, decode, 0), ValueError, "batch_size must be at least 1, got 0"),
        (
            lambda s: s.episode(0).batches(read, decode, 4, shuffle_buffer=0),
            ValueError,
            "shuffle_buffer must be at least 1, got 0",
        ),
        (lambda s: s.episode(0).batches(read, decode, 4, num_workers=-1), ValueError, "num_workers must be at least 0, got -1"),
        (lambda s: s.episode(0).batches(read, decode, 4, num_workers=2.0), TypeError, "num_workers must be an int, got float"),
        (
            lambda s: s.episode(0).batches(read, decode, 4, rank=2, world_size=2),
            ValueError,
            r"rank must lie in \[0, world_size=2\)",
        ),
        (
            lambda s: s.episode(0).batches(read, decode, 4, world_size=9),
            ValueError,
            "world_size=9 ranks must have a shard each, got 8",
        ),
        (
            lambda s: s.episode(0).batches(read, decode, 4, max_dropped=2),
            ValueError,
            r"max_dropped must be a share in \[0, 1\], got 2",
        ),
        (lambda s: s.episode(0).batches(read, decode, 4, only=[1]), TypeError, "only must be a torch.Tensor, got list"),
    ],
)
def test_bad_arguments_are_named(stream, call, error, message):
    with pytest.raises(error, match=message):
        call(stream)

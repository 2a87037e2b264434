"""Nothing of episodes and teachers depends on torch's process-wide default device and dtype."""

import pytest
import torch
from helpers import assert_equal, in_new_process

pytestmark = pytest.mark.cpu_only

CODE = """
import sys
import numpy as np
import torch
from protoclip_losses import EpisodeSampler, FeatureBank, FeatureCollector, StreamEpisodes, TeacherAdapter
from protoclip_losses.episodes import EpisodeOrder, WithIndex, extract
from protoclip_losses.teachers import PCA

folder, default = sys.argv[1:]
cpu = torch.device("cpu")
rows = torch.from_numpy(np.random.default_rng(0).standard_normal((36, 6)).astype("float32"))
texts = [f"caption {i}" for i in range(36)]
model = torch.nn.Linear(6, 4, dtype=torch.float32)
with torch.no_grad():
    model.weight.copy_(rows[:4]), model.bias.zero_()
np.save(folder + "/rows.npy", rows.numpy())
if default == "meta":
    torch.set_default_device("meta")
elif default == "float64":
    torch.set_default_dtype(torch.float64)

def encode(captions):
    return rows.numpy()[[int(c.split()[1]) for c in captions]]

def as_they_are(samples):
    return samples

out = {}
sampler = EpisodeSampler(36, 12, seed=1)
episode = next(iter(sampler))
index = episode.index
out["episode"], out["shard"] = index, episode.shard(1, 3)
out["order"] = list(EpisodeOrder(sampler, 1, 3))
bank = FeatureBank(index, dim=6)
bank.update(index, rows[index], rows[index].half(), audio=rows[index])
bank.update(index[:3], rows[index[:3]], rows[:3], audio=rows[index[:3]])
out["bank"], out["missing"] = bank.state_dict(), bank.missing
other = FeatureBank(index, dim=6)
other.load_state_dict(bank.state_dict())
out["loaded bank"] = other.state_dict()
out["extracted"] = extract(model, [index], lambda i: (i, model(rows[i]), model(rows[i]))).state_dict()

stream = StreamEpisodes(["a", "b", "c"], 3, seed=2)
passing = next(iter(stream)).batches(lambda shard: range(7), str, 4, shuffle_buffer=3, collate_fn=as_they_are,
                                     only=torch.arange(0, 2**34, 2**32, device=cpu))
out["stream"] = [(i, batch) for i, batch in passing]
passing = stream.episode(1).batches(lambda shard: range(7), str, 4, shuffle_buffer=3, collate_fn=as_they_are)
batches = iter(passing)
next(batches)
resumed = stream.episode(1).batches(lambda shard: range(7), str, 4, shuffle_buffer=3, collate_fn=as_they_are)
resumed.load_state_dict(passing.state_dict())
out["resumed"] = [(i, batch) for i, batch in resumed]
out["pass"] = resumed.state_dict()
by_workers = stream.episode(1).batches(lambda shard: range(7), str, 4, num_workers=1, collate_fn=as_they_are)
out["workers"] = [(i, batch) for i, batch in by_workers]

collector = FeatureCollector(dim=6)
out["nothing collected"] = collector.index
for part in (index[:5], index[5:]):
    collector.update(part, rows[part], rows[part], teacher_features={"t": rows[part]})
out["collector"] = collector.state_dict()
again = FeatureCollector(dim=6)
again.load_state_dict(collector.state_dict())
out["collected"] = again.bank().state_dict()

for name, teacher in {
    "file": TeacherAdapter.from_file(folder + "/rows.npy", dim=3, normalize=True),
    "tensor": TeacherAdapter.from_tensor(rows, 3),
    "encoder": TeacherAdapter.from_encoder(encode, texts, f"{folder}/{default}.npy", dim=3, progress=False, batch_size=7),
    "collected": again.teachers()["t"],
}.items():
    out[name] = teacher[index], teacher.state_dict()
    teacher.load_state_dict(teacher.state_dict())
    out[name + " again"] = teacher[index]
teacher = TeacherAdapter.from_encoder(encode, texts, f"{folder}/{default}.npy", dim=3, progress=False)
out["encode"] = teacher.encode(texts[3:7]), teacher.encode([])
out["pca"] = PCA.fit([rows[:20], rows[20:]], 2)(rows)
torch.save(out, f"{folder}/{default}.pt")
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    in_new_process(CODE, folder, "plain")
    return torch.load(folder / "plain.pt", weights_only=True)


@pytest.mark.parametrize("default", ["meta", "float64"])
def test_results_are_those_of_a_process_without_defaults(tmp_path, plain, default):
    in_new_process(CODE, tmp_path, default)
    found = torch.load(tmp_path / f"{default}.pt", weights_only=True)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        try:
            assert_equal(value, found[name])
        except AssertionError as error:
            raise AssertionError(f"{name} differs") from error
